"""What a method of `rmt compare` is: it fits on a footing and on what other methods have left, and is restored from
what it stored. Only restored states are measured, so that a number is that of the file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .footing import Footing

Kind = Literal["image", "text", "head"]


@dataclass(frozen=True)
class State:
    """A classifier, `logits(encode_image(x))`, which methods are put on one after the other.

    model: an open_clip model, plain (masks are merged in), in eval mode, frozen. A method that changes it works on a
        copy.
    stack: the methods that have changed `model`, in order: what frozen features are kept under.
    text: (C, D) class vectors of length 1, on the model's device.
    logits: (B, D) fp32 image features, not normalised -> (B, C) fp32 logits.
    """

    model: nn.Module
    stack: tuple[str, ...]
    text: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """What fitting gave.

    stored: all that must be kept beside the base model and the class names. trained: numbers that were fitted.
    chosen: hyperparameters by name, those that validation images chose too. steps: gradient steps, of how many the
        authors take (None: no such number). files: bytes in files that the method wrote itself, in place of `stored`.
    facts: more of the result, by its keys. notes: what a reader of the table should know. seconds_before: of training
        that earlier calls, which were stopped, have done.
    """

    stored: dict[str, Tensor]
    trained: int
    chosen: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    published_steps: int | None = None
    files: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds_before: float = 0.0


class Method:
    """A subclass is one method; instances have no state. Raises UserError in `fit` where it cannot run, with a remedy.

    name: as in --methods. kind: whether it changes the towers (image), the class vectors (text), or what is computed
        from features and class vectors (head); methods are combined in this order.
    source: whose recipe, where it was read. needs_val: chooses on validation images. reads_text: a head that starts
        from the class vectors.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[Kind]
    source: ClassVar[str]
    needs_val: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    def fit(self, footing: "Footing", state: State) -> Fit:
        """Trains on the footing's images, on top of `state`, which stays as it is."""
        raise NotImplementedError

    def restore(self, footing: "Footing", state: State, stored: dict[str, Tensor]) -> State:
        """`state` with what `fit` stored put on it. No training image is looked at."""
        raise NotImplementedError


def cosine_logits(model: nn.Module, text: Tensor) -> Callable[[Tensor], Tensor]:
    """CLIP's own head: exp(logit_scale) * cosine, in fp32; text (C, D) of length 1."""
    scale = model.logit_scale.detach().exp()
    return lambda features: scale * F.normalize(features.float(), dim=-1) @ text.T
