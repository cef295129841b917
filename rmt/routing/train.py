"""Tuning what is trainable in a host on captions or on questions: the step, the loop, and the official recipes.

Next-token cross-entropy for captions, binary cross-entropy against soft targets for questions; AdamW with linear
warm-up and decay. Source of the recipes: scripts/run_vit_{gpt2,roberta}_{lora,adapter}.sh of the official code.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from ..data.batches import prefetch
from .inject import Routed
from .resume import RoutingResume

# What the scripts run, routing aside, which is asked for by its function; gpt2-* are for captions, roberta-* for VQA.
_GPT2 = {"lr": 3e-5, "warmup": 5000, "batch": 40, "epochs": 20, "train_ln": True}
_ROBERTA = {"lr": 3e-4, "warmup": 0.05, "batch": 512, "epochs": 20, "train_ln": True, "double_embeddings": True}
_LORA = {"kind": "lora", "r": 128, "alpha": 128, "train_bias": True}
PRESETS: dict[str, dict] = {
    "gpt2-lora": {**_LORA, **_GPT2, "couple_qv": True},
    "gpt2-adapter": {"kind": "adapter", "r": 128, "share": True, "zero_init": False, **_GPT2},
    "roberta-lora": {**_LORA, **_ROBERTA},
    "roberta-adapter": {"kind": "adapter", "r": 64, "residual": False, "zero_init": False, **_ROBERTA},
}


@dataclass(frozen=True)
class RoutingTrainConfig:
    """The recipe. Beyond lr, warmup and steps the official code leaves transformers' AdamW as it is: no decay of
    weights, eps 1e-6, no clipping.

    Args:
        lr: the largest step size. warmup: steps in which it rises from 0, or their share of all where below 1; it then
            falls to 0 in a straight line.
        steps: how many to take in place of epochs. epochs: passes over all captions or questions.
        weight_decay: AdamW's. clip: the largest norm of the gradient; None: it is not clipped.
        precision: bf16 runs the model under autocast; parameters, moments and the loss stay fp32.
        seed: of dropout; every random number is a function of it and the step.
        log_every: steps between two logged rows. save_every: seconds between two writings of the resume file.
    """

    lr: float = 3e-5
    warmup: float = 0.05
    steps: int | None = None
    epochs: int = 20
    weight_decay: float = 0.0
    clip: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 1
    log_every: int = 20
    save_every: float = 60.0

    def __post_init__(self) -> None:
        def need(good: bool, what: str) -> None:
            if not good:
                name = what.split()[0]
                raise UserError(f"{what}, got {getattr(self, name)!r}")

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def count(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1

        need(number(self.lr) and self.lr > 0, "lr must be a finite number above 0")
        warm = number(self.warmup) and self.warmup >= 0 and (self.warmup < 1 or self.warmup == int(self.warmup))
        need(warm, "warmup must be a number of steps, or a share of them below 1")
        need(self.steps is None or count(self.steps), "steps must be an integer of at least 1, or None")
        need(count(self.epochs), "epochs must be an integer of at least 1")
        need(number(self.weight_decay) and self.weight_decay >= 0, "weight_decay must be a finite number from 0 up")
        need(self.clip is None or (number(self.clip) and self.clip > 0), "clip must be a number above 0, or None")
        need(self.precision in ("fp32", "bf16"), "precision must be fp32 or bf16")
        need(isinstance(self.seed, int), "seed must be an integer")
        need(count(self.log_every), "log_every must be an integer of at least 1")
        need(number(self.save_every) and self.save_every >= 0, "save_every must be a number of seconds")

    def rates(self, steps_per_epoch: int) -> list[float]:
        """The step size of every step. The first is 0 where there is warm-up: as get_linear_schedule_with_warmup.

        Raises: UserError for a warm-up that takes all steps.
        """
        total = self.steps or self.epochs * steps_per_epoch
        warm = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if warm >= total:
            raise UserError(f"warmup must be shorter than the run of {total} steps, got {warm}: --warmup 0.05 is 5 %")
        return [self.lr * (s / warm if s < warm else (total - s) / (total - warm)) for s in range(total)]


Loss = Callable[[nn.Module, Sequence[Tensor]], Tensor]


def caption_loss(model: nn.Module, batch: Sequence[Tensor], pad: int = 0) -> Tensor:
    """Mean next-token cross-entropy, nats a token, of image (B, 3, H, W) and text (B, T); padding is left out.

    Source: open_clip's CoCaLoss, without its contrastive part, which routing never reaches.
    """
    logits, labels = next_tokens(model, batch)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad)


def next_tokens(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """logits (B, L, V) fp32, labels (B, L) int64, the token that each place is to say, of model(image, text).

    The model gives a dict or an object with `logits` and `labels` of one length, as open_clip's CoCa does; or logits
    alone, one row for each of T text tokens, or T + 1 with one image token before them, as rmt's Hugging Face hosts.

    Raises: UserError for anything else.
    """
    output, text = model(*batch), batch[1]
    found = [output.get(k) if isinstance(output, Mapping) else getattr(output, k, None) for k in ("logits", "labels")]
    logits, labels = found
    if isinstance(logits, Tensor) and labels is None and (before := logits.shape[1] - text.shape[1]) in (0, 1):
        # The last row speaks of what follows the text.
        logits, labels = logits[:, :-1], text[:, 1 - before :]
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or logits.shape[:2] != labels.shape:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else None for t in found]
        raise UserError(f"a captioner must give logits (B, L, V) and labels (B, L), got {shapes}")
    return logits.float(), labels


def vqa_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean binary cross-entropy of image, text and target (B, C), the soft targets of `rmt.data.vqa`."""
    image, text, target = batch
    return F.binary_cross_entropy_with_logits(answer_logits(model, image, text), target)


def answer_logits(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """(B, C) fp32, of a model that gives them, or a dict or an object that has them as `logits`."""
    output = model(image, text)
    if not isinstance(output, Tensor):
        output = output["logits"] if isinstance(output, Mapping) else output.logits
    return output.float()


def train_captions(model: nn.Module, routed: Routed | None, batches: Callable[[int], tuple[Tensor, ...]],
                   config: RoutingTrainConfig, *, pad: int = 0, **others) -> None:  # fmt: skip
    """`train` with `caption_loss`. routed: what was injected into the model; None trains what is trainable."""
    train(model, routed, batches, config, lambda model, batch: caption_loss(model, batch, pad), **others)


def train_vqa(model: nn.Module, routed: Routed | None, batches: Callable[[int], tuple[Tensor, ...]],
              config: RoutingTrainConfig, **others) -> None:  # fmt: skip
    """`train` with `vqa_loss`. An answer head that is to train has requires_grad set after the injection."""
    train(model, routed, batches, config, vqa_loss, **others)


def train(
    model: nn.Module, routed: Routed | None, batches: Callable[[int], tuple[Tensor, ...]], config: RoutingTrainConfig,
    loss: Loss, *, log: Callable[[dict], None] = lambda row: None, tick: Callable[[int], None] = lambda step: None,
    resume: RoutingResume | None = None,
) -> None:  # fmt: skip
    """Trains, in place, all parameters of `model` that require a gradient: those of `routed`, and a head's.

    Args:
        batches: step -> tensors, the first of them images; `steps_per_epoch` counts where the config has no steps.
        loss: (model, tensors on its device) -> (). log: gets a row of numbers every `log_every` steps and after the
            last; tick: the number of steps done. resume: where to go on from and to keep the state.

    Raises: UserError where nothing trains, where `routed` is of another model or removed, and for a loss or a gradient
        that is not finite, before that step changes anything.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    known = {id(p) for p in named.values()}
    if not named or (routed and any(id(p) not in known for p in routed.parameters())):
        raise UserError("the model must have trainable parameters, those of the injection among them, got none of them")
    rates = config.rates(getattr(batches, "steps_per_epoch", 0))
    parameters, device = list(named.values()), next(iter(named.values())).device
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, eps=1e-6, weight_decay=config.weight_decay)
    if resume:
        resume.load(named, optimizer)
    steps = range(resume.steps_done if resume else 0, len(rates))
    with _training(model, device):
        for step, batch in zip(steps, prefetch(batches, steps)):
            torch.manual_seed(config.seed * 1_000_003 + step)
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                value = loss(model, [tensor.to(device) for tensor in batch])
            value.backward()
            # With no largest norm the gradients stay as they are, and the norm is a number to log.
            norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
            numbers = {"loss": value.item(), "grad_norm": norm.item()}
            for name, number in numbers.items():
                if not math.isfinite(number):
                    text = f"step {step + 1}: {name} must be finite, got {number}: is the learning rate too large?"
                    raise UserError(text)
            optimizer.step()
            last = step + 1 == len(rates)
            if (step + 1) % config.log_every == 0 or last:
                log({"step": step + 1, "lr": rates[step], **numbers})
            tick(step + 1)
            if resume:
                resume.save(named, optimizer, step + 1, last=last)


@contextlib.contextmanager
def _training(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in training mode, and torch's generators given back as they were."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
