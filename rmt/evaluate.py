"""A run's model, masks and data ready for use; a finished run, or a task that was shared, read back.

Nothing here chooses anything: `Setup.test` measures, and what chooses before tuning (`prepare(choose=...)`) is handed a
split whose test part is empty.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import clip
from .checkpoint import MASK_FILE, Task, load_task
from .config import RunConfig, UserError, build, from_yaml, resolve
from .data import Cache, Split, eval_batches, few_shot, read, subset
from .hub_id import task_source
from .masked import Mask
from .measures import Accuracy, accuracy
from .model import MaskModel, get_mask_model
from .progress import progress
from .world import World

CONFIG_FILE, TASK_FOLDER, RESULT_FILE = "config.yaml", "task", "result.json"
TEMPLATE = "a photo of a {}."


@dataclass
class Setup:
    """What a run works on: `clip.model` is what `model` wraps, with its masked modules. config: resolved.

    text: of the split's class names in `template`.
    """

    clip: clip.Clip
    model: MaskModel
    masks: list[Mask]
    split: Split
    text: clip.Text
    template: str
    config: RunConfig
    cache: Cache = field(default_factory=Cache)

    def test(self, *, frozen: bool = False, part: str = "test", world: World | None = None) -> Accuracy:
        """Of the images of one part, with the masks as they are or, frozen, without them: the zero-shot model.

        world: processes that measure a share of the images each; all of them get the counts over all images.
        """
        world = world or World()
        compute = clip.frozen_logits if frozen else clip.logits
        features = self.text.teacher() if frozen else self.text.features(grad=False)
        items, classes = getattr(self.split, part), len(self.split.classnames)
        world.need(len(items), f"{part} images")
        items = items[world.share(len(items))]
        batches = eval_batches(items, self.clip.preprocess, cache=self.cache)
        with progress("zero-shot" if frozen else "tuned", len(items)) as advance:
            watched = _watched(batches, advance)
            found = world.together(
                lambda: accuracy(lambda x: compute(self.clip.model, x, features), watched, classes, features.device)
            )
        return Accuracy(world.sum_(found.confusion), world.sum_(found.bins))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.clip.model.logit_scale.device

    def on(self, split: Split, template: str) -> "Setup":
        """The same model and masks on other images and classes: text features are made anew for its class names."""
        text = clip.Text.make(self.clip, split.classnames, template)
        return dataclasses.replace(self, split=split, text=text, template=template)


def _watched(batches: Iterable[tuple[Tensor, Tensor]], advance: Callable[[int], None]) -> Iterator:
    done = 0
    for image, label in batches:
        yield image, label
        advance(done := done + len(label))


def sampled(config: RunConfig) -> Split:
    """The data of a run: CoOp's few-shot sample over all classes, and only then the base or new half of them."""
    split = read(config)
    if config.shots != "all":
        train, val = few_shot(split.train, split.val, config.shots, config.seed)
        split = dataclasses.replace(split, train=train, val=val)
    return subset(split, config.classes)


def prepare(
    config: RunConfig, split: Split | None = None,
    choose: Callable[[clip.Clip, Split, Tensor, RunConfig], Any] | None = None,
) -> Setup:  # fmt: skip
    """Loads model and data, swaps the masked modules in and computes the text features. Raises UserError.

    Args:
        split: None: the whole data of the config, without few-shot sampling. A run that trains gives `sampled(config)`.
        choose: called with the plain model, the split without its test images, the zero-shot text features (C, D) and
            the resolved config; returns the `rmt.select.Selection` to mask.
    """
    config, split, loaded, template = _load(config, split)
    selection = None
    if choose is not None:
        features = clip.text_features(loaded, split.classnames, template)
        selection = choose(loaded, dataclasses.replace(split, test=[]), features, config)
    return _setup(config, split, loaded, template, get_mask_model(loaded.model, config.mask, selection))


def _load(config: RunConfig, split: Split | None) -> tuple[RunConfig, Split, clip.Clip, str]:
    config, device = resolve(config), clip.pick_device(config.device)
    split = subset(read(config), config.classes) if split is None else split
    loaded = clip.load(config.model, config.pretrained, config.image_size, device)
    return config, split, loaded, config.template or split.template or TEMPLATE


def _setup(config: RunConfig, split: Split, loaded: clip.Clip, template: str, model: MaskModel) -> Setup:
    text = clip.Text.make(loaded, split.classnames, template)
    return Setup(loaded, model, model.masks, split, text, template, config)


def read_config(folder: str | Path) -> RunConfig:
    """The config of a run folder. Raises UserError where it is missing or damaged."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"expected a run folder with {CONFIG_FILE} and {TASK_FOLDER}/, got {str(folder)!r} without it")
    try:
        return from_yaml(path.read_text())
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def task_path(folder: str | Path) -> Path:
    """The task folder of a run folder; any other path is taken for a task's own, and user/name for one on the hub."""
    inside = Path(folder) / TASK_FOLDER
    return inside if inside.is_dir() else task_source(folder)


def read_run(folder: str | Path, **changed: Any) -> tuple[RunConfig, Task]:
    """Config and task of a finished run, or of a task folder alone. changed: fields of the config to replace.

    Raises: UserError where one is missing or damaged, or where a task alone is given no data or names no model.
    """
    path = task_path(folder)
    if (Path(folder) / CONFIG_FILE).is_file() or not (path.is_file() or (path / MASK_FILE).is_file()):
        return dataclasses.replace(read_config(folder), **changed), load_task(path)
    task = load_task(path)
    if not (changed.get("model") or task.model):
        raise UserError(f"{task.path} does not say which base model it is for: it must be given")
    # A composed task's config says what it was made of, which is no field of a run's.
    values = {name: value for name, value in task.config.items() if name != "composed"}
    values |= {"model": task.model, "pretrained": task.pretrained, "template": task.template}
    return build(RunConfig, values | changed, f"the config of {task.path}"), task


def load_run(
    config: RunConfig, task: Task, split: Split | None = None, allow_base_mismatch: bool = False
) -> Setup:  # fmt: skip
    """`prepare`, with the masks of `task` and, where the config names none, its template.

    split: other data than the config's; its classes may be others then.

    Raises: UserError where the model, or the config's class names, are not the task's.
    """
    given = split is not None
    config, split, loaded, template = _load(config, split)
    if not given and split.classnames != task.classnames:
        odd = sorted(set(split.classnames) ^ set(task.classnames)) or "their order"
        source = config.data or f"{config.dataset} in {config.root}"
        raise UserError(f"{source} must have the task's {len(task.classnames)} classes; the two differ in {odd}")
    model = MaskModel.from_pretrained(loaded.model, task.path, allow_base_mismatch=allow_base_mismatch)
    template = config.template or task.template or template
    return _setup(config, split, loaded, template, model)
