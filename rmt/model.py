"""A model with masks, by the verbs that PEFT's users know.

model = rmt.get_mask_model(open_clip_model, rmt.MaskConfig())
model.print_trainable_parameters()
...                                         # train: model.encode_image(...), rmt.backward, rmt.MaskAdam(model)
model.save_pretrained("task")
model = rmt.MaskModel.from_pretrained(open_clip_model, "task")             # or the hub's "user/name"
plain = model.merge_and_unload()
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint import Task, apply_task, load_task, save_task
from .config import MaskConfig, RunConfig, build
from .hub_id import task_source
from .masked import Mask, disabled, masks
from .masking import apply_keys, apply_masks, remove_masks
from .wrapping import Wrapping


def get_mask_model(model: nn.Module, config: MaskConfig | None = None, selection: Any = None) -> "MaskModel":
    """`model` with masks, changed in place. config None: R-AMT's. selection: what `rmt.select` returns.

    Raises: UserError where `model` has masks already, or lacks what `config` names; it is then as it was.
    """
    config = config or MaskConfig()
    apply_masks(model, config, selection)
    return MaskModel(model, config)


class MaskModel(Wrapping):
    """A masked model and what its masks are. Calls and attributes (`encode_image`, `logit_scale`) are the model's own.

    BatchNorm layers stay in eval mode through `train()`, as in the official code: their statistics are the model's, and
    frozen. (`model.model.train()` goes past that.)

    Args:
        model: has masks already: `get_mask_model` is the way to one.
        config: those masks' configuration.
    """

    def __init__(self, model: nn.Module, config: MaskConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.training = model.training

    def train(self, mode: bool = True) -> "MaskModel":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    @property
    def mask_root(self) -> nn.Module:
        """Where the names of masks begin: their keys are state-dict names of the plain model."""
        return self.model

    @property
    def masks(self) -> list[Mask]:
        """In module order; the position is a mask's random stream in `rmt.backward`."""
        return masks(self.model)

    def print_trainable_parameters(self) -> None:
        """Prints masked and selected weights, their share of the model's parameters and the bytes of their bits."""
        found = self.masks
        masked, selected = sum(m.weight.numel() for m in found), sum(m.scores.numel() for m in found)
        scores = {id(m.scores) for m in found}
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in scores)
        size = sum(m.bits.numel() * m.bits.element_size() for m in found)
        share = 100 * masked / total
        print(f"masks      {len(found)} tensors, {masked:,} weights, {share:.2f} % of {total:,} parameters")
        print(f"scores     {selected:,} trainable, {100 * selected / masked:.2f} % of the masked weights")
        print(f"task file  {size:,} bytes of bits")

    def save_pretrained(
        self, folder: str | Path, classnames: Sequence[str] = (), template: str | None = None,
        config: RunConfig | None = None, text_features: Tensor | None = None,
    ) -> Task:  # fmt: skip
        """Writes the task folder.

        Args:
            config: of the run that tuned the masks. text_features: (C, D), rows of length 1, of the class names.

        Raises: OSError where it cannot be written; UserError for text features that do not fit.
        """
        return save_task(folder, self.masks, tuple(classnames), config, template, text_features=text_features)

    def push_to_hub(
        self, repo_id: str, *, classnames: Sequence[str] = (), template: str | None = None,
        config: RunConfig | None = None, numbers: Mapping[str, float | str] | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Pushes the task to the hub's user/name, which is made where it is missing. Returns the commit's address.

        Args:
            classnames, template, config: as for `save_pretrained`. numbers: rows of the card.
            options: huggingface_hub's: private, token, branch, commit_message, create_pr.

        Raises: UserError where the id is none, or the hub refuses or cannot be reached; no commit is made then.
        """
        from .hub import HubTask

        with tempfile.TemporaryDirectory() as folder:
            task = save_task(folder, self.masks, tuple(classnames), config, template, numbers)
            return HubTask.of(task.path.parent).push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | Path, allow_base_mismatch: bool = False, **hub: Any
    ) -> "MaskModel":
        """`model`, plain so far, with the masks of a task folder or file, or of the hub's user/name[@revision].

        hub: options of `rmt.hub.resolve`: revision, token, cache_dir, local_files_only, force_download.

        Raises: UserError where the task is missing, damaged or, unless allowed, of another base model.
        """
        if hub:
            from .hub import resolve

            task = load_task(resolve(folder, **hub))
        else:
            task = load_task(task_source(folder))
        saved = (task.config or {}).get("mask")
        config = MaskConfig() if saved is None else build(MaskConfig, saved, f"the mask config of {folder}")
        apply_task(task, apply_keys(model, task.shapes, config), allow_base_mismatch=allow_base_mismatch)
        return cls(model, config)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the frozen zero-shot one."""
        with disabled(self.model):
            yield

    def merge_and_unload(self) -> nn.Module:
        """The plain model again, in place, with the masks merged in: exact, off weights are 0 and no other has changed.

        Outputs are equal bit for bit where torch runs the same kernels; its fused inference path, which a plain
        nn.MultiheadAttention takes (`torch.backends.mha`), rounds differently.
        """
        return remove_masks(self.model)
