"""What one training step needs, planned without weights and without a GPU.

    rmt plan --model ViT-L-14 --batch 64 --precision bf16 --device H200

The step's own code (`rmt.step.gradients`, `MaskAdam.step`) runs on fake tensors: torch's meta tensors that claim to be
on the CPU, so that autocast and attention choose as they do there. `rmt.tracking` follows every storage and product.
What is planned is what the tensors take: a kernel's own scratch, an allocator's rounding and, on a GPU, the CUDA
context (about half a GiB) come on top. One step is like the other from the second on, which is the one reported: one of
those with a teacher's forward of its own, as all have once a bit is off.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import clip
from .config import MaskConfig, TrainConfig, UserError
from .devices import Device
from .fully_sharded import blocks_of, matrices
from .masked import Mask, disabled
from .masking import apply_masks
from .optim import MaskAdam
from .skeleton import skeleton
from .step import gradients
from .tracking import Tracker

KINDS = (
    "weights", "scores", "moments", "bits", "masked weight", "weight copies", "gradients", "activations", "temporaries",
    "inputs",
)  # fmt: skip
ROLES = ("forward", "teacher", "input cotangents", "weight gradients", "attention")
STEPS = 2


@dataclass(frozen=True)
class StepPlan:
    """What a step needs.

    Args:
        masks, masked, weights: how many tensors are masked, of how many weights, of how many in the model.
        bytes: by kind, where most is alive; peak: the op that made it so, after its part of the step.
        flops: by role. moved: bytes that weight-sized passes read and write, by op.
        sizes: numbers of scores, mask for mask. sharded: weights in matrices of all blocks, as `rmt.fully_sharded`
            has them; blocks: of each one in the towers that have masks.
    """

    masks: int
    masked: int
    weights: int
    bytes: dict[str, int] = field(default_factory=dict)
    peak: str = ""
    flops: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    sharded: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.bytes.values())

    def floor(self, device: Device) -> dict[str, float]:
        """Milliseconds: its products at the device's rate, its weight-sized passes at its bandwidth, and both."""
        products, update = 1e3 * sum(self.flops.values()) / device.rate, 1e3 * sum(self.moved.values()) / device.copy
        return {"products": products, "update": update, "floor": products + update}


def plan_step(
    name: str, mask: MaskConfig, train: TrainConfig, *, image_size: int | None = None, classes: int = 100
) -> StepPlan:
    """Plans a step of `train.batch` images on the open_clip model `name`, a name or `local-dir:PATH`.

    Raises: UserError for a model that open_clip does not know, an image size that it cannot have, or such masks.
    """
    for option, value in (("image_size", image_size), ("classes", classes)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be an integer of at least 1, got {value}")
    model = skeleton(name, image_size)
    with FakeTensorMode():
        _fake(model)
        found = apply_masks(model, mask)
        size = model.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        image, label = torch.empty(train.batch, 3, *size), torch.empty(train.batch, dtype=torch.int64)
        tracker = follow(model, found, _text(model, classes), image, label, train)
    live, op = tracker.peak()
    return StepPlan(
        len(found), sum(m.weight.numel() for m in found),
        sum(p.numel() for n, p in model.named_parameters() if not n.endswith("scores")),
        {kind: live.get(kind, 0) for kind in KINDS}, op, {role: tracker.flops[role] for role in ROLES},
        dict(tracker.moved), tuple(m.scores.numel() for m in found), *_layers(model, mask),
    )  # fmt: skip


def follow(
    model: nn.Module, found: list[Mask], text: Tensor | clip.Text, image: Tensor, label: Tensor, train: TrainConfig,
    steps: int = STEPS,
) -> Tracker:  # fmt: skip
    """Takes `steps` steps on real tensors or fake ones; returns what the last of them needed."""
    optimizer, layer = MaskAdam(found, state=train.adam), found[0].module
    tracker = Tracker(lambda: "forward" if layer.masked else "teacher", (m.weight.numel() for m in found))
    scores = {id(m.scores) for m in found}
    tracker.track((p for p in model.parameters() if id(p) not in scores), "weights")
    tracker.track(model.buffers(), "weights")
    tracker.track((m.scores for m in found), "scores")
    inputs = (text.tokens, text.zero_shot) if isinstance(text, clip.Text) else (text,)
    tracker.track((image, label, *inputs), "inputs")

    def name_gradient(gradient: Tensor | None) -> None:
        if gradient is not None:
            tracker.track([gradient], "gradients")

    handles = [m.scores.register_hook(name_gradient) for m in found]
    try:
        for step in range(steps):
            _name_state(tracker, found, optimizer)
            with tracker:
                tracker.restart()
                gradients(model, text, image, label, optimizer, train, seed=0, step=step, alike=False)
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return tracker


def _name_state(tracker: Tracker, found: list[Mask], optimizer: MaskAdam) -> None:
    """What a mask and the optimizer keep from step to step."""
    tracker.track((m.bits for m in found), "bits")
    tracker.track((m.module.kept(m.prefix) for m in found), "masked weight")
    tracker.track([optimizer.counts], "moments")
    tracker.track((t for state in optimizer.state.values() for t in state.values()), "moments")


def _fake(model: nn.Module) -> None:
    """Puts fake CPU tensors in the place of a meta model's; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def fake(t: Tensor) -> Tensor:
        empty = torch.empty(t.shape, dtype=t.dtype, device="cpu")
        return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is None:
                    continue
                if id(t) not in made:
                    made[id(t)] = fake(t)
                table[name] = made[id(t)]


def _layers(model: nn.Module, mask: MaskConfig) -> tuple[int, tuple[int, ...]]:
    """Weights of all blocks, and of each one in the towers with masks."""

    def weights(root: nn.Module) -> tuple[int, ...]:
        return tuple(sum(p.numel() for p in matrices(block).values()) for _, _, block in blocks_of(root))

    tower = model.visual if mask.towers == ("image",) and not mask.modules else model
    return sum(weights(model)), weights(tower)


def _text(model: nn.Module, classes: int) -> clip.Text:
    tokens = torch.zeros(classes, model.context_length, dtype=torch.int64)
    with torch.no_grad(), disabled(model):
        return clip.Text(model, tokens, F.normalize(model.encode_text(tokens), dim=-1))
