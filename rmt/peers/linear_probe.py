"""Linear probes of frozen image features: logistic regression, and CLAP's, which begins at the class vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import probe
from ..config import UserError
from .footing import Footing
from .heads import dassl_rates, shuffled, train_head
from .method import Fit, Method, State, cosine_logits

BATCH, EPOCHS, LR, MOMENTUM = 256, 300, 0.1, 0.9


class LinearProbe(Method):
    """Logistic regression on features that are not normalised: `f @ weight.T + bias`, as `rmt.probe` fits it.

    The solver is run to its end whatever a limit of steps says: its iterations are no gradient steps.
    """

    name, title, kind = "linear_probe", "Linear probe", "head"
    source = "Radford et al., ICML 2021; KaiyangZhou/CoOp, lpclip/linear_probe.py; the images are those of all methods"
    needs_val, reads_text = True, False

    def fit(self, footing: Footing, state: State) -> Fit:
        """stored: weight (C, D), bias (C,). Raises UserError without validation images, without an image of a class,
        or where there is one class only."""
        footing.need_val(self.name)
        parts = [part.cpu() for p in ("train", "val") for part in (footing.features(state, p), footing.labels(p))]
        _need_every_class(parts[1], footing.split.classnames)
        fitted = probe.fit(*parts)
        chosen = {"C": fitted.penalty, "val_acc1": fitted.val_acc1, "max_iterations": probe.ITERATIONS}
        stored = {"weight": fitted.weight, "bias": fitted.bias}
        return Fit(stored, sum(t.numel() for t in stored.values()), chosen)

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """logits: f @ weight.T + bias."""
        weight, bias = (stored[key].to(footing.device) for key in ("weight", "bias"))
        return State(state.model, state.stack, state.text, lambda f: F.linear(f.float(), weight, bias))


class ZeroShotProbe(Method):
    """CLAP's ZS-LP: class vectors trained from the zero-shot ones, on exp(logit_scale) * cosine; no choice is made.

    The authors start from text features that are not normalised. Their length, which the cosine does not see, sets how
    far a step turns them, so that the class vectors get the length of the model's own text features.
    Ours: the augmented passes of all methods where the authors draw from 20 of their own; one template, where they take
    eight on ImageNet; fp32.
    """

    name, title, kind = "linear_probe_zs", "Linear probe from zero-shot", "head"
    source = (
        "Silva-Rodriguez et al., CVPR 2024, ZS-LP: jusiro/CLAP, trainers/adapters.py (ADAPTER, INIT ZS, CONSTRAINT "
        "none) and configs/trainers/SGD_lr1e-1_B256_ep300.yaml; momentum is Dassl's default"
    )

    def fit(self, footing: Footing, state: State) -> Fit:
        """stored: weight (C, D), not normalised. A class without images is only pushed away from the others'."""
        with torch.no_grad():
            length = state.model.encode_text(footing.text.tokens).float().norm(dim=-1, keepdim=True)
        weight = (state.text * length).requires_grad_()
        scale = state.model.logit_scale.detach().exp()
        # As the authors' train loader, whose last incomplete batch is dropped unless it is the only one; a batch is
        # drawn from all augmented passes.
        each = max(1, len(footing.split.train) // BATCH)
        pool = torch.cat([footing.features(state, "train", view) for view in range(footing.views)])
        pool, labels = F.normalize(pool, dim=-1), footing.labels("train").repeat(footing.views)
        random = torch.Generator().manual_seed(footing.config.seed)
        steps, lr = footing.feature_steps(each * EPOCHS), footing.rate(self.name, LR)
        train_head(
            footing, torch.optim.SGD([weight], lr, MOMENTUM), dassl_rates(lr, steps, EPOCHS),
            lambda number: shuffled(pool, labels, BATCH, random, each),
            lambda f: scale * f @ F.normalize(weight, dim=-1).T, self.name,
        )  # fmt: skip
        chosen = {"lr": lr, "batch": BATCH, "epochs": EPOCHS, "momentum": MOMENTUM, "views": footing.views}
        return Fit({"weight": weight.detach().cpu()}, weight.numel(), chosen, steps, each * EPOCHS)

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """logits: exp(logit_scale) * cosine(f, weight)."""
        weight = F.normalize(stored["weight"].to(footing.device), dim=-1)
        return State(state.model, state.stack, state.text, cosine_logits(state.model, weight))


def _need_every_class(labels: Tensor, classnames: tuple[str, ...]) -> None:
    lost = [name for label, name in enumerate(classnames) if not (labels == label).any()]
    if lost:
        raise UserError(
            f"linear_probe needs training images of every class, got none of {', '.join(lost)}: put some into the "
            "training images, or leave the method out"
        )
    if len(classnames) < 2:
        raise UserError(f"linear_probe tells two classes or more apart, got {list(classnames)}: leave the method out")
