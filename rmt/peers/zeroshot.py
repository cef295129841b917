"""The model as it is: the template's class vectors, nothing trained."""

from torch import Tensor

from .footing import Footing
from .method import Fit, Method, State


class ZeroShot(Method):
    """CLIP's zero-shot classifier: one template, no ensemble."""

    name, title, kind = "zeroshot", "zero-shot", "head"
    source = "Radford et al., ICML 2021; one template a data set, as CoOp's ZeroshotCLIP"

    def fit(self, footing: Footing, state: State) -> Fit:
        """Nothing to fit."""
        return Fit({}, 0)

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """The state as it is."""
        return state
