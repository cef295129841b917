"""What a routing run is made of, and its YAML."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import UserError
from .config import Function, RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .train import RoutingTrainConfig


@dataclass(frozen=True)
class RouteConfig:
    """One run. The official code has recipes for GPT-2 and RoBERTa, none for CoCa: lr is that of its RoBERTa runs, the
    batch that of its GPT-2 runs, the rest as in `RoutedLoRAConfig`, `RoutedAdapterConfig` and `RoutingTrainConfig`.

    Args:
        model: open_clip CoCa: a name, local-dir:PATH or hf-hub:ID. pretrained: tag or file of a name's weights.
        captions: folder with captions.json, captions.csv or dataset_coco.json. image_size: pixels, in place of the
            model's.
        kind: lora or adapter. function: none, add, mul, expand or gram. r: width of the bottleneck. alpha: of LoRA's
            scale alpha / r; by default r. dropout: before LoRA's A.
        sites: LoRA's products, by default self.q and self.v. couple_qv: q and v in one bottleneck. layers: numbers of
            blocks, by default all. source: mean, tokens or first of the image tokens.
        lr: the largest step size. warmup: steps, or their share below 1. steps: how many, in place of epochs. epochs:
            passes over all captions. batch: captions a step. weight_decay: AdamW's. clip: the gradient's largest norm.
        precision: fp32, or bf16 autocast. checkpointing: compute blocks again in the backward pass, for memory.
        seed: of batches, dropout and first values. limit: measure on no more than so many images, the first ones.
        generate: caption so many held-out images greedily and score them. length: of a caption, in tokens.
        device: auto, cpu, cuda, cuda:1, ... log_every: steps between two rows. save_every: seconds between two
            writings of the resume file.
    """

    model: str
    captions: str
    pretrained: str | None = None
    image_size: int | None = None
    kind: Literal["lora", "adapter"] = "lora"
    function: Function = "mul"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    sites: tuple[str, ...] = ("self.q", "self.v")
    couple_qv: bool = False
    layers: tuple[int, ...] | None = None
    source: Literal["mean", "tokens", "first"] = "mean"
    lr: float = 3e-4
    warmup: float = 0.05
    steps: int | None = None
    epochs: int = 20
    batch: int = 40
    weight_decay: float = 0.0
    clip: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    seed: int = 1
    limit: int | None = None
    generate: int = 0
    length: int = 30
    device: str = "auto"
    log_every: int = 20
    save_every: float = 60.0

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "adapter"):
            raise UserError(f"kind must be lora or adapter, got {self.kind!r}")
        for name, low in {"limit": 1, "generate": 0, "batch": 1, "length": 2}.items():
            value = getattr(self, name)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= low
            if not good and not (name == "limit" and value is None):
                raise UserError(f"{name} must be an integer of at least {low}, got {value!r}")
        # Both check what they are made of.
        self.injection()
        self.training()

    def injection(self) -> RoutedConfig:
        """What is put into the host."""
        kind = RoutedLoRAConfig if self.kind == "lora" else RoutedAdapterConfig
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if hasattr(self, f.name)})

    def training(self) -> RoutingTrainConfig:
        """The recipe."""
        return RoutingTrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RoutingTrainConfig)})


def to_yaml(config: RouteConfig) -> str:
    """What `from_yaml` reads as an equal config."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)


def read_yaml(path: str | Path) -> dict:
    """The values of a config file. Raises UserError for what is none."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config must be a YAML file, got {str(path)!r}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, got {type(values).__name__}")
    return values
