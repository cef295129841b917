"""The training steps that bench/train_step.py compares, on one model, from the same first scores.

Each is an object with `step(image, label, uniforms)` and `state()`. All but "as published" share the frozen weights.
"""

import copy
import dataclasses
from collections.abc import Callable

import official
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmt_kernels as rk
from rmt.config import MaskConfig, TrainConfig
from rmt.graph import CapturedStep
from rmt.masking import apply_masks
from rmt.memory import keep_freed_memory
from rmt.optim import MaskAdam
from rmt.step import Step

SEED, INIT, CLASSES, STRENGTH, LR = 1, 1e-2, 100, 0.3, 8e-5
# First scores are uniform from LOW to INIT, so that 2.5 % are below the threshold of 5e-3 (the paper's share is 2.56).
OFF = 0.025
LOW = (official.THRESHOLD - OFF * INIT) / (1 - OFF)
PUBLISHED, EAGER, EAGER_TF32, COMPILED = "as published", "fixed eager", "fixed eager, tf32", "compiled"
RMT, FIRST, LONG, GRAPH = "rmt", "rmt, before the first flip", "rmt, no shortcuts", "rmt + graph"
NAMES = (PUBLISHED, EAGER, EAGER_TF32, COMPILED, RMT, FIRST, LONG, GRAPH)


class Skipped(Exception):
    """This variant cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is timed. size: image side, layers: blocks of the image tower; None: the model's own.

    malloc: "kept", where the process keeps freed memory as `rmt` commands do, or "default"; alike for all variants.
    """

    model: str
    batch: int
    device: str = "cpu"
    precision: str = "fp32"
    size: int | None = None
    layers: int | None = None
    malloc: str = "kept"


class Problem:
    """A model with random weights, text features and two batches: a function of the setup alone."""

    def __init__(self, setup: Setup) -> None:
        import open_clip

        if setup.malloc == "kept" and not keep_freed_memory():
            raise SystemExit("this system's malloc cannot be told to keep freed memory: --malloc default")
        self.setup, self.device = setup, torch.device(setup.device)
        config = open_clip.get_model_config(setup.model)
        if config is None:
            raise SystemExit(f"open_clip has no model {setup.model!r}")
        # The text tower runs nowhere here.
        config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": 64}
        given = {"image_size": setup.size, "layers": setup.layers}
        config["vision_cfg"] |= {name: value for name, value in given.items() if value is not None}
        torch.manual_seed(0)
        self.model = open_clip.CLIP(**config).eval().requires_grad_(False)
        with torch.no_grad():
            self.model.logit_scale.fill_(4.6)  # CLIP's own after training
        self.model.to(self.device)
        side, generator = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(SEED)
        self.text = F.normalize(torch.randn(CLASSES, config["embed_dim"], generator=generator), dim=-1).to(self.device)
        images = torch.randn(2, setup.batch, 3, side, side, generator=generator)
        labels = torch.randint(CLASSES, (2, setup.batch), generator=generator)
        self.drawn: dict[int, list[Tensor]] = {}  # kept: on a CPU they take seconds to make
        self.batches = list(zip(images.to(self.device), labels.to(self.device)))

    def scores(self, usual: bool) -> dict[str, Tensor]:
        """Name -> first scores, in the weight's shape: 2.5 % of them off, or (usual False) all at their init."""
        made = {}
        for i, name in enumerate(official.masked_names(self.model)):
            weight = self.model.get_parameter(name)
            uniform = torch.rand(weight.shape, generator=torch.Generator().manual_seed(i)) if usual else 0.0
            made[name] = torch.full(weight.shape, INIT).sub_(uniform, alpha=INIT - LOW).to(self.device)
        return made

    def uniforms(self, step: int) -> list[Tensor]:
        """The draws of rmt in that step, for those that take theirs from outside. (N, ...) of each masked weight."""
        if step not in self.drawn:
            rng = rk.rng_state(SEED, step)
            shapes = [self.model.get_parameter(name).shape for name in official.masked_names(self.model)]
            self.drawn[step] = [rk.philox_uniform(rng, i, shape).to(self.device) for i, shape in enumerate(shapes)]
        return self.drawn[step]

    def shared(self) -> nn.Module:
        """The model again, on the same weights."""
        same = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.model.parameters()}
        return copy.deepcopy(self.model, same)


class Variant:
    """A step function and what it trains."""

    tf32 = False

    def step(self, image: Tensor, label: Tensor, uniforms: list[Tensor] | None = None) -> None:
        """One step. uniforms: the draws to use; None: its own."""
        raise NotImplementedError

    def state(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(scores, exp_avg, exp_avg_sq) of each masked weight, as (N, K), live."""
        raise NotImplementedError

    def run(self, image: Tensor, label: Tensor, uniforms: list[Tensor] | None = None) -> None:
        """`step` with this variant's products: TF32 or not."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        self.step(image, label, uniforms)


class Official(Variant):
    """bench/official.py, as published or with a teacher that has no graph."""

    def __init__(
        self, problem: Problem, precision: str, usual: bool = True, kind: type = official.Tuner, **options
    ) -> None:
        self.tf32 = precision == "tf32"
        autocast = torch.bfloat16 if precision == "bf16" else None
        self.tuner = kind(
            problem.shared(), problem.text, problem.scores(usual), LR, STRENGTH, autocast=autocast, **options
        )

    def step(self, image: Tensor, label: Tensor, uniforms: list[Tensor] | None = None) -> None:
        self.tuner.step(image, label, uniforms)

    def state(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        moments = self.tuner.moments()
        return [tuple(t.detach().flatten(1) for t in row) for row in zip(self.tuner.scores.values(), *moments)]


class CompiledTuner(official.Tuner):
    """What a good user does: forwards and losses in one compiled graph, dropout and Adam of a weight in another.

    Adam's step count goes in as a tensor, else every step would be compiled anew.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.averages = [[torch.zeros_like(m) for m in self.scores.values()] for _ in range(2)]
        self.lr, self.taken = self.optimizer.param_groups[0]["lr"], 0
        self.losses = torch.compile(super().losses, fullgraph=True, dynamic=False)
        self._tail = torch.compile(self._one, fullgraph=True, dynamic=False)

    @staticmethod
    def _one(scores, grad, general, exp_avg, exp_avg_sq, strength: float, factors, uniform) -> None:
        grad = official.gradient_dropout(grad, general, strength, uniform)
        exp_avg.lerp_(grad, 0.1)
        exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
        scores.sub_(exp_avg * factors[0] / (exp_avg_sq.sqrt() * factors[1] + official.EPS))

    @torch.no_grad()
    def update(self, kept: list[Tensor], uniforms: list[Tensor] | None) -> None:
        self.taken += 1
        scores = list(self.scores.values())
        count = torch.tensor(self.taken, device=scores[0].device)
        factors = rk.adam_factors(count, self.lr, 0.9, 0.999)
        draws = uniforms or [None] * len(scores)
        for m, b, exp_avg, exp_avg_sq, uniform in zip(scores, kept, *self.averages, draws):
            self._tail(m.detach(), m.grad, b, exp_avg, exp_avg_sq, self.strength, factors, uniform)

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        return tuple(self.averages)


class Rmt(Variant):
    """rmt's own step: masks, `rmt.step`, MaskAdam."""

    def __init__(self, problem: Problem, usual: bool = True, shortcuts: bool = True, graph: bool = False) -> None:
        precision = problem.setup.precision
        self.tf32 = precision == "tf32"
        self.model, self.text = problem.shared(), problem.text
        self.masks = apply_masks(self.model, MaskConfig(targets=("attention", "conv")))
        first = problem.scores(usual)
        with torch.no_grad():
            for mask in self.masks:
                mask.scores.copy_(first.pop(mask.key).flatten(1))
                mask.refresh()
        if first:
            raise RuntimeError(f"the official code masks {list(first)} too")
        lr = torch.tensor(LR, dtype=torch.float64, device=problem.device) if graph else LR
        self.optimizer = MaskAdam(self.masks, lr=lr, capturable=graph)
        half = "bf16" if precision == "bf16" else "fp32"
        config = TrainConfig(strength=STRENGTH, l2=official.L2, precision=half, shortcuts=shortcuts)
        self.take = (CapturedStep if graph else Step)(self.model, self.text, self.optimizer, config, seed=SEED)
        self.taken = 0

    def step(self, image: Tensor, label: Tensor, uniforms: list[Tensor] | None = None) -> None:
        """uniforms are not read: rmt draws the very same itself, from the seed and the step."""
        self.take(image, label, self.taken)
        self.taken += 1

    def state(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        states = [self.optimizer.state[mask.scores] for mask in self.masks]
        return [(m.scores.detach(), s["exp_avg"], s["exp_avg_sq"]) for m, s in zip(self.masks, states)]

    def hold(self) -> None:
        """From now on steps cost what they cost, and move no score."""
        self.optimizer.set_lr(0.0)


def runs_in(setup: Setup, name: str) -> str:
    """The precision of a variant's products."""
    return {PUBLISHED: "fp32", EAGER_TF32: "tf32"}.get(name, setup.precision)


def _eager_tf32(problem: Problem) -> Variant:
    if problem.device.type != "cuda" or problem.setup.precision != "bf16":
        raise Skipped("it is a baseline of bf16 runs on CUDA")
    return Official(problem, "tf32", teacher_graph=False)


def _compiled(problem: Problem) -> Variant:
    # Two backward passes through one compiled forward: its saved tensors must not be given away in the first.
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return Official(problem, problem.setup.precision, kind=CompiledTuner, teacher_graph=False)


def _graph(problem: Problem) -> Variant:
    if problem.device.type != "cuda":
        raise Skipped("a CUDA graph needs a CUDA device")
    return Rmt(problem, graph=True)


MAKE: dict[str, Callable[[Problem], Variant]] = {
    PUBLISHED: lambda problem: Official(problem, "fp32"),
    EAGER: lambda problem: Official(problem, problem.setup.precision, teacher_graph=False),
    EAGER_TF32: _eager_tf32,
    COMPILED: _compiled,
    RMT: Rmt,
    FIRST: lambda problem: Rmt(problem, usual=False),
    LONG: lambda problem: Rmt(problem, shortcuts=False),
    GRAPH: _graph,
}
