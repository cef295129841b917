"""Mask tuning itself, as a method among the others: R-AMT, and its relatives by preset."""

import dataclasses
import time

from torch import Tensor

from .. import clip
from ..agreement import what_is_there
from ..checkpoint import save_task, write_whole
from ..config import RunConfig, resolve, to_yaml
from ..evaluate import CONFIG_FILE, TASK_FOLDER, Setup
from ..masking import per_layer
from ..model import MaskModel, get_mask_model
from ..run import choose, tune_masks
from ..schedule import Plan, plan
from .footing import Footing, class_vectors
from .method import Fit, Method, State, cosine_logits


class MaskTuning(Method):
    """Masks trained by `rmt.train.tune`, as `rmt train` does; the task folder is what is stored."""

    kind = "image"
    source = "Zheng et al., ICCV 2023; wuw2019/R-AMT at 07f8d2c, as rmt train has it"
    preset = "ramt"
    drops = True
    spread: float | None = None

    def config(self, footing: Footing) -> RunConfig:
        """The resolved config of the masks' run."""
        asked = dataclasses.replace(footing.config, preset=self.preset)
        strength = asked.train.strength if self.drops else 0.0
        asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, strength=strength))
        found = resolve(asked)
        train = dataclasses.replace(found.train, lr=footing.rate(self.name, found.train.lr))
        mask = found.mask if self.spread is None else dataclasses.replace(found.mask, spread=self.spread)
        return dataclasses.replace(found, mask=mask, train=train)

    def schedule(self, footing: Footing, config: RunConfig) -> tuple[RunConfig, Plan, int]:
        """(config, rates, published steps): the length that was asked for, cut where the footing has a limit.

        published: the recipe's own length, whatever was asked for.
        """
        per_epoch, asked = footing.batches().steps_per_epoch, footing.config.train
        made = plan(config.train, config.mask, per_epoch, stretch=asked.epochs is None)
        steps = footing.steps(len(made.rates))
        if steps < len(made.rates):
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=None, steps=steps))
            made = plan(config.train, config.mask, per_epoch, stretch=False)
        free = dataclasses.replace(footing.config, train=dataclasses.replace(asked, epochs=None, steps=None))
        recipe = self.config(dataclasses.replace(footing, config=free))
        published = plan(recipe.train, recipe.mask, per_epoch, stretch=True)
        return config, made, len(published.rates)

    def setup(self, footing: Footing, state: State, config: RunConfig) -> Setup:
        """A masked copy of the state's model, ready to be tuned."""
        model = footing.copy(state)
        loaded = dataclasses.replace(footing.loaded, model=model)
        unseen = dataclasses.replace(footing.split, test=[])
        selection = choose(loaded, unseen, state.text, config) if config.select.criterion else None
        masked = get_mask_model(model, config.mask, selection)
        # The text tower is the copy's own where it has masks, and must have its teacher's features before them.
        text = clip.Text(model, footing.text.tokens, state.text)
        return Setup(loaded, masked, masked.masks, footing.split, text, footing.template, config, footing.cache)

    def fit(self, footing: Footing, state: State) -> Fit:
        """Tunes into the footing's folder; a run that was killed goes on where its resume file stands."""
        config, made, published = self.schedule(footing, self.config(footing))
        setup = self.setup(footing, state, config)
        footing.folder.mkdir(parents=True, exist_ok=True)
        batches = footing.batches()
        start = time.perf_counter()
        seconds = tune_masks(setup, config, made, batches, what_is_there(setup, batches), footing.folder)
        before = max(0.0, seconds - (time.perf_counter() - start))
        return dataclasses.replace(self.stored(footing, setup, config, made, published), seconds_before=before)

    def stored(self, footing: Footing, setup: Setup, config: RunConfig, made: Plan, published: int) -> Fit:
        """Writes the task folder, and the config that lets `rmt eval` measure it."""
        folder = footing.folder
        task = save_task(folder / TASK_FOLDER, setup.masks, footing.split.classnames, config, footing.template)
        write_whole(folder / CONFIG_FILE, to_yaml(config).encode())
        layers = per_layer(setup.masks)
        off, masked = (sum(row[i] for row in layers) for i in (1, 2))
        train = config.train
        facts = {
            "percent_off": 100 * off / masked, "off": off, "masked": masked, "per_layer": layers,
            "bits_sha256": task.bits_sha256, "task_bytes": task.path.stat().st_size,
        }  # fmt: skip
        chosen = {
            "lr": train.lr, "strength": train.strength, "l2": train.l2, "targets": config.mask.targets,
            "init": config.mask.init, "threshold": config.mask.threshold, "spread": config.mask.spread,
        }  # fmt: skip
        return Fit(
            {}, sum(mask.scores.numel() for mask in setup.masks), chosen, len(made.rates), published,
            files=facts["task_bytes"], facts=facts, notes=(made.message,) if made.message else (),
        )  # fmt: skip

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """A plain model with the task's masks merged in."""
        model = MaskModel.from_pretrained(footing.copy(state), footing.folder / TASK_FOLDER).merge_and_unload()
        text = class_vectors(footing, model)
        return State(model, (*state.stack, self.name), text, cosine_logits(model, text))


class RAMT(MaskTuning):
    """Regularized attention mask tuning: the method of this package."""

    name, title = "ramt", "R-AMT"


class SpreadRAMT(MaskTuning):
    """The same from first scores that are spread: this package's own start, not the paper's."""

    name, title = "ramt_spread", "R-AMT, spread start"
    spread = 1.0


class AMT(MaskTuning):
    """The same without gradient dropout."""

    name, title = "amt", "AMT"
    drops = False


class RMMT(MaskTuning):
    """Masks on the MLPs."""

    name = preset = "rmmt"
    title = "R-MMT"


class RPMT(MaskTuning):
    """Masks on all weights."""

    name = preset = "rpmt"
    title = "R-PMT"
