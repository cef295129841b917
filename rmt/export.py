"""A task merged into its base model, as one file that runs without rmt and without open_clip.

torch    a `torch.export` archive (.pt2): torch.export.load(FILE).module()(images)
onnx     for onnxruntime and others: session.run(None, {"images": images})

images (B, 3, H, W) fp32, preprocessed as FILE.json says; any B. With class names: logits (B, C) and probabilities
(B, C), the text features baked in. Features only: features (B, D), as `encode_image` gives them.
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clip
from .checkpoint import Task, load_task
from .config import UserError
from .files import write_together
from .merge import load_base, without_fused_attention
from .model import MaskModel

FORMATS = ("torch", "onnx")
# Of cosines: what fp32 sums in another order differ by, with room. Logits are cosines times the model's scale.
ATOL = 1e-5
_CHECKED, _TRACED = (1, 3), 2


class _Exported(nn.Module):
    """The image tower, and for class names the product with their text features (C, D), L2-normalised, scaled."""

    def __init__(self, model: nn.Module, text: Tensor | None) -> None:
        super().__init__()
        self.visual = model.visual
        self.register_buffer("text", None if text is None else model.logit_scale.detach().exp() * text)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.visual(images)
        # CoCa's gives its tokens as well.
        features = features[0] if isinstance(features, tuple) else features
        if self.text is None:
            return features
        logits = F.normalize(features.float(), dim=-1) @ self.text.T
        return logits, logits.softmax(-1)


def export(
    task_path: str | Path, out: str | Path, kind: str = "torch", features_only: bool = False,
    model: str | None = None, pretrained: str | None = None, allow_base_mismatch: bool = False,
) -> Path:  # fmt: skip
    """Writes `out` and `out`.json, which says what goes in and what comes out; both whole or not at all.

    ONNX above 1.5 GiB has its weights in `out`.data, where `out` looks for them.

    Before they get their names the file is loaded and run, by torch or onnxruntime, on batches of 1 and 3 random
    images, against the live masked model: cosines may differ by 1e-5 (logits and probabilities by that times the
    model's scale), features by 1e-5 of their length.

    Args:
        kind: torch or onnx. features_only: no class names and no text features.
        model, pretrained: the base model, as for `rmt.clip.load`; None: as the task names it.

    Raises: UserError where a package is missing, the task has no class names or no template to bake in, the base model
        is unknown or another, it cannot be exported, or the file computes something else; OSError where the disk is
        full. Nothing is written then.
    """
    if kind not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if kind == "onnx":
        _need_onnx()
    task, out = load_task(task_path), Path(out)
    if not features_only and not (task.classnames and task.template):
        raise UserError(f"{task.path} has no class names or no template to bake in: only its features can be exported")
    loaded = load_base(task, model, pretrained, torch.device("cpu"))
    masked = MaskModel.from_pretrained(loaded.model, task.path, allow_base_mismatch=allow_base_mismatch)
    size = clip.image_format(loaded.model)[0]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, 3, *size, generator=generator) for batch in _CHECKED]
    with without_fused_attention(), torch.no_grad():
        text = None if features_only else _text(loaded, task)
        wanted = [_wanted(loaded.model, batch, text) for batch in images]
        loaded.model = masked.merge_and_unload().requires_grad_(False)
        module = _Exported(loaded.model, text).eval()
        about = _about(loaded, task, features_only)
        with tempfile.TemporaryDirectory() as scratch:
            # ONNX names the file beside it, where weights above 1.5 GiB go, after its own.
            path = Path(scratch) / (out.name if kind == "onnx" else "model.pt2")
            run = (_onnx if kind == "onnx" else _torch)(module, torch.randn(_TRACED, 3, *size), path, about)
            scale = 1.0 if features_only else loaded.model.logit_scale.exp().item()
            for batch, want in zip(images, wanted):
                _need_near(run(batch), want, scale)
            beside = {out.with_name(f.name): f.read_bytes() for f in Path(scratch).iterdir() if f != path}
            data = path.read_bytes()
    out.parent.mkdir(parents=True, exist_ok=True)
    described = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    write_together({**beside, out: data, out.with_name(f"{out.name}.json"): described})
    return out


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"to export ONNX needs onnx, onnxscript and onnxruntime (extra [export]): {error}") from error


def _text(loaded: clip.Clip, task: Task) -> Tensor:
    """(C, D), of the text tower with its masks, if it has any."""
    if task.text_features is not None:
        return task.text_features.float()
    return clip.Text.make(loaded, task.classnames, task.template).features()


def _wanted(model: nn.Module, images: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
    if text is None:
        return (model.encode_image(images),)
    logits = clip.logits(model, images, text)
    return logits, logits.softmax(-1)


def _about(loaded: clip.Clip, task: Task, features_only: bool) -> dict[str, Any]:
    size, mean, std = clip.image_format(loaded.model)
    cfg = loaded.model.visual.preprocess_cfg
    outputs = ["features"] if features_only else ["logits", "probabilities"]
    return {
        "inputs": {"images": ["batch", 3, *size]}, "outputs": outputs,
        "classnames": [] if features_only else list(task.classnames),
        "template": None if features_only else task.template, "mean": list(mean), "std": list(std),
        "interpolation": cfg.get("interpolation"), "resize_mode": cfg.get("resize_mode"), "model": task.model,
        "pretrained": task.pretrained, "bits_sha256": task.bits_sha256, "base_sha256": task.base_sha256,
    }  # fmt: skip


def _program(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(module, (images,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"torch.export cannot trace {type(module.visual).__name__}: {line}") from error


def _torch(module: nn.Module, images: Tensor, path: Path, about: dict[str, Any]) -> Callable:
    """Writes the archive, with the description in it; returns what runs it."""
    torch.export.save(_program(module, images), path, extra_files={"rmt.json": json.dumps(about)})
    with warnings.catch_warnings():
        # Newer torch reads the archive's own bytes without a copy, and says so; nobody writes into them here.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        ran = torch.export.load(path).module()

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        result = ran(batch)
        return result if isinstance(result, tuple) else (result,)

    return run


def _onnx(module: nn.Module, images: Tensor, path: Path, about: dict[str, Any]) -> Callable:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            _program(module, images), (), dynamo=True, input_names=["images"], output_names=about["outputs"],
            verbose=False,
        )  # fmt: skip
    # Metadata values are strings.
    program.model.metadata_props["rmt"] = json.dumps(about, ensure_ascii=False)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: tuple(map(torch.from_numpy, session.run(None, {"images": batch.numpy()})))


def _need_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], scale: float) -> None:
    for one, other in zip(got, want, strict=True):
        size = other.float().norm(dim=-1).max().item() if len(want) == 1 else scale
        error = (one.float() - other.float()).abs().max().item() if one.shape == other.shape else float("inf")
        if not error <= ATOL * size:
            raise UserError(
                f"the exported file must compute what the masked model does, within {ATOL * size:.2g}, but differs by "
                f"{error:.2g} for a batch of {len(other)}"
            )
