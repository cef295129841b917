"""What a routing run is made of, and its YAML."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import UserError
from .config import Function, RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .train import RoutingTrainConfig

Host = Literal["coca", "gpt2", "roberta"]
HOSTS: dict[Host, str] = {
    "coca": "a CoCa (--model)",
    "gpt2": "captions with --vision and --text",
    "roberta": "--questions with --vision and --text",
}
# Options that mean nothing to the other hosts.
OF_HOSTS: dict[str, tuple[Host, ...]] = {
    "pretrained": ("coca",), "image_size": ("coca",), "prefix": ("gpt2",), "beams": ("gpt2",),
    "generate": ("coca", "gpt2"), "min_answers": ("roberta",), "draw_pooler": ("roberta",),
    "double_embeddings": ("roberta",),
    # A pooler gives one visual token, whatever source says; a length is that of a caption that is made.
    "source": ("coca",), "length": ("coca", "gpt2"),
}  # fmt: skip


def host_of(model: str | None, questions: str | None) -> Host:
    """Of a run with such a model and such data."""
    if model is not None:
        return "coca"
    return "gpt2" if questions is None else "roberta"


@dataclass(frozen=True)
class RouteConfig:
    """One run. The official code has recipes for GPT-2 and RoBERTa, none for CoCa: lr is that of its RoBERTa runs, the
    batch that of its GPT-2 runs, the rest as in `RoutedLoRAConfig`, `RoutedAdapterConfig` and `RoutingTrainConfig`.

    Args:
        model: open_clip CoCa: a name, local-dir:PATH or hf-hub:ID. pretrained: tag or file of a name's weights.
        captions: folder with captions.json, captions.csv or dataset_coco.json. image_size: pixels, in place of the
            model's.
        vision: in place of a CoCa, a Hugging Face ViT with pooler, a name or a folder, beside text. text: its text
            model, GPT-2 for captions, RoBERTa for questions. prefix: put the image before GPT-2's text as one token;
            false: only routed modules see it.
        questions: in place of captions, a folder of VQAv2. min_answers: an answer is a class where so many training
            questions have it. draw_pooler: draw the pooler of a RoBERTa that comes without one, by the seed.
        double_embeddings: positions and LayerNorm twice over the question, as the official code.
        kind: lora or adapter. function: none, add, mul, expand or gram. r: width of the bottleneck. alpha: of LoRA's
            scale alpha / r; by default r. dropout: before LoRA's A; an adapter has neither.
        train_ln: train the LayerNorms of the layers too, as the official code. train_bias: and the biases of LoRA's
            products.
        share: one adapter for attention and MLP of a block, as published for GPT-2. residual: add an adapter's input to
            its output; false as published for RoBERTa. zero_init: begin with its way up at 0; false as published.
        sites: LoRA's products, by default self.q and self.v; beside an adapter those whose biases are trained.
            couple_qv: q and v in one bottleneck. layers: numbers of blocks, by default all. source: mean, tokens or
            first of a CoCa's image tokens.
        lr: the largest step size. warmup: steps, or their share below 1. steps: how many, in place of epochs. epochs:
            passes over all captions. batch: captions a step. weight_decay: AdamW's. clip: the gradient's largest norm.
        precision: fp32, or bf16 autocast. checkpointing: compute blocks again in the backward pass, for memory.
        seed: of batches, dropout and first values. limit: measure on no more than so many images, the first ones.
        generate: caption so many held-out images and score them. length: of a caption, in tokens. beams: of the search
            for captions, 1: greedy; more with vision and text alone.
        device: auto, cpu, cuda, cuda:1, ... log_every: steps between two rows. save_every: seconds between two
            writings of the resume file.
    """

    model: str | None = None
    captions: str | None = None
    pretrained: str | None = None
    image_size: int | None = None
    vision: str | None = None
    text: str | None = None
    prefix: bool = True
    questions: str | None = None
    min_answers: int = 9
    draw_pooler: bool = False
    double_embeddings: bool = False
    kind: Literal["lora", "adapter"] = "lora"
    function: Function = "mul"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    share: bool = False
    residual: bool = True
    zero_init: bool = True
    train_ln: bool = False
    train_bias: bool = False
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
    beams: int = 1
    device: str = "auto"
    log_every: int = 20
    save_every: float = 60.0

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "adapter"):
            raise UserError(f"kind must be lora or adapter, got {self.kind!r}")
        self._need_host_and_data()
        counts = {"limit": 1, "generate": 0, "batch": 1, "length": 2, "beams": 1, "min_answers": 1}
        for name, low in counts.items():
            value = getattr(self, name)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= low
            if not good and not (name == "limit" and value is None):
                raise UserError(f"{name} must be an integer of at least {low}, got {value!r}")
        # Both check what they are made of.
        self.injection()
        self.training()

    def _need_host_and_data(self) -> None:
        """One host, one kind of data, and no option that is another host's."""
        pair = (self.vision, self.text)
        if self.model is None and None in pair:
            raise UserError("--model must be given, or both --vision and --text (--help says how)")
        if self.model is not None and pair != (None, None):
            raise UserError("a run has one host: --model, or --vision and --text, got both")
        if (self.captions is None) == (self.questions is None):
            got = "neither" if self.captions is None else "both"
            raise UserError(f"one of --captions and --questions must be given, got {got}")
        if self.model is not None and self.questions is not None:
            raise UserError("--questions needs --vision and --text, a ViT and a RoBERTa: a CoCa answers none")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, hosts in OF_HOSTS.items():
            if self.host not in hosts and getattr(self, name) != defaults[name]:
                known = " or ".join(HOSTS[host] for host in hosts)
                raise UserError(f"--{name.replace('_', '-')} is of {known}, not of {HOSTS[self.host]}")
        if self.kind == "lora" and (self.share or not self.residual or not self.zero_init):
            raise UserError("--share, --residual and --zero-init are of --kind adapter, not of lora")
        if self.kind == "adapter":
            for name in ("couple_qv", "alpha", "dropout"):
                if getattr(self, name) != defaults[name]:
                    raise UserError(f"--{name.replace('_', '-')} is of --kind lora, not of adapter")
            if self.sites != defaults["sites"] and not self.train_bias:
                raise UserError("--sites is of --kind lora, or of an adapter with --train-bias, which trains theirs")

    @property
    def host(self) -> Host:
        """Which kind of model is tuned."""
        return host_of(self.model, self.questions)

    @property
    def data(self) -> str:
        """The folder of captions or questions."""
        return self.captions if self.questions is None else self.questions

    def injection(self) -> RoutedConfig:
        """What is put into the host."""
        kind = RoutedLoRAConfig if self.kind == "lora" else RoutedAdapterConfig
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if hasattr(self, f.name)})

    def training(self) -> RoutingTrainConfig:
        """The recipe."""
        return RoutingTrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RoutingTrainConfig)})


def to_yaml(config: RouteConfig) -> str:
    """What `rmt.config.from_yaml` reads as an equal config."""
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
