"""The whole step in one CUDA graph: forwards, both backward passes, update. `--train.graph true`.

A step of a small model is some two thousand launches, more than a host can issue in the time that the device needs for
them. Captured once, they are replayed with one. Everything that changes from step to step is read from the device:
images, labels, seed, step and learning rate, scores and all that follows them.
"""

import torch
from torch import Tensor, nn

from . import clip
from .config import TrainConfig, UserError
from .optim import MaskAdam
from .step import gradients

WARMUP = 3  # steps that libraries take to pick kernels and make workspaces; they count as steps


class CapturedStep:
    """Steps of one model, text and batch shape. Equal to `gradients` and `optimizer.step()`, bit for bit.

    While no bit is off and after that for WARMUP steps it runs as it stands; then it is captured.

    Args:
        optimizer: a `MaskAdam` with capturable=True and a learning rate that is a float64 tensor on the device.
        config: as for `gradients`; batches in parts are captured too.

    Raises: UserError off CUDA, ValueError for an optimizer that counts on the host.
    """

    def __init__(
        self, model: nn.Module, text: Tensor | clip.Text, optimizer: MaskAdam, config: TrainConfig, *, seed: int
    ) -> None:
        self.device = optimizer.masks[0].scores.device
        if self.device.type != "cuda":
            raise UserError(f"graph needs a CUDA device, the model is on {self.device}")
        lr = optimizer.param_groups[0]["lr"]
        if not optimizer.capturable or not isinstance(lr, Tensor) or lr.dtype != torch.float64:
            raise ValueError(f"a graph needs MaskAdam(capturable=True, lr=a float64 tensor), got lr={lr!r}")
        self.model, self.text, self.optimizer, self.config = model, text, optimizer, config
        self.seed, self.step = (torch.tensor(v, dtype=torch.int64, device=self.device) for v in (seed, 0))
        self.outputs: tuple[Tensor, ...] = ()
        self.stream, self.warm = torch.cuda.Stream(self.device), 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, image: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """One step. Returns logits, teacher logits (B, C) and labels, which the next call overwrites."""
        self.step.fill_(step)
        if self.graph is None:
            if (self.config.shortcuts and self.optimizer.all_on()) or self.warm < WARMUP:
                return self._plain(image, label)
            self._capture(image, label)
        if image.shape != self.inputs[0].shape:
            raise ValueError(f"a graph takes images {tuple(self.inputs[0].shape)}, got {tuple(image.shape)}")
        for kept, new in zip(self.inputs, (image, label)):
            kept.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _plain(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # On a stream of its own, as capture wants the warm-up: the caching allocator keeps pools per stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            alike = self.config.shortcuts and self.optimizer.all_on() and self.graph is None
            self.outputs = self._step(image.to(self.device), label.to(self.device), alike)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.warm += not alike
        return self.outputs

    def _step(self, image: Tensor, label: Tensor, alike: bool) -> tuple[Tensor, Tensor, Tensor]:
        outputs = gradients(
            self.model, self.text, image, label, self.optimizer, self.config, seed=self.seed, step=self.step,
            alike=alike,
        )  # fmt: skip
        self.optimizer.step()
        return outputs

    def _capture(self, image: Tensor, label: Tensor) -> None:
        self.inputs = image.to(self.device, copy=True), label.to(self.device, copy=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.outputs = self._step(*self.inputs, alike=False)
