"""The cells of one sample: units are fitted, stored and restored one on top of the other, then measured."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..checkpoint import environment, write_json, write_whole
from ..data import indices_sha256
from ..measures import accuracy
from .footing import Footing, encode
from .memory import PeakMemory
from .method import Method, State
from .names import Stack, method, parse

FIT_FILE, RESULT_FILE = "fit.json", "result.json"
# Images a pass where the rate of inference is measured, and seconds that it takes at least.
SPEED_IMAGES, SPEED_SECONDS = 100, 0.5
WORST, EXAMPLES = 3, 4


class Sample:
    """Cells of one number of shots and one seed.

    A method is a list of units: single parts, or masks and context that are trained together. Each unit is fitted on
    the state that the units before it give, once, in the folder of the method that these units are.
    """

    def __init__(
        self, footing: Footing, out: Path, dataset: str, model_sha256: str, options: Any, command: str
    ) -> None:  # fmt: skip
        self.footing, self.out, self.dataset, self.command = footing, out, dataset, command
        self.model_sha256, self.options = model_sha256, options
        self._states: dict[tuple[str, ...], State] = {(): footing.start()}
        # fit.json of the fits that the one in progress has taken over: what they cost, it would have cost too.
        self._borrowed: list[dict[str, Any]] = []

    def folder(self, units: Sequence[str]) -> Path:
        """OUT/{method}/shots{K}-seed{S}."""
        name = parse("+".join(units)).name
        return self.out / name / f"shots{self.footing.config.shots}-seed{self.footing.config.seed}"

    def result(self, stack: Stack) -> dict[str, Any]:
        """Of one method: read back where it is finished. Raises UserError where it cannot run."""
        units = units_of(stack)
        path = self.folder(units) / RESULT_FILE
        if path.is_file():
            return json.loads(path.read_text())
        state = self.state(units)
        made = self._described(stack, units) | self._measured(state)
        write_json(path, made)
        return made

    def state(self, units: tuple[str, ...]) -> State:
        """What the units give, restored from their files; what is not fitted yet is fitted."""
        if units not in self._states:
            before = self.state(units[:-1])
            footing = dataclasses.replace(self.footing, folder=self.folder(units), fitted=self._fitted)
            if not (footing.folder / FIT_FILE).is_file():
                self._fit(footing, units, before)
            stored = load_file(_tensors(footing.folder, units[-1]), str(footing.device))
            self._states[units] = unit(units[-1]).restore(footing, before, stored)
        return self._states[units]

    def forget(self, following: Sequence[Stack]) -> None:
        """Frees models and features that no method of `following` starts from."""
        wanted = {units[:n] for stack in following for units in [units_of(stack)] for n in range(len(units))}
        self._states = {units: state for units, state in self._states.items() if not units or units in wanted}
        kept = {state.stack for state in self._states.values()}
        self.footing.shelf.drop(lambda key: isinstance(key[0], tuple) and key[0] not in kept)

    def _fitted(self, name: str) -> dict[str, Tensor]:
        """What a method of one unit stored on this sample; what it cost counts for the one that asks."""
        units, key, shelf = units_of(parse(name)), ("fitted", name), self.footing.shelf
        file = self.folder(units) / FIT_FILE
        if file.is_file():
            shelf.put(key, name, None, 0.0)
        # Through the shelf, so that its seconds are not counted as those of the fit that asks.
        shelf.get(key, name, lambda: self.state(units))
        fit = json.loads(file.read_text())
        shelf.put(key, name, None, fit["own_seconds"])
        self._borrowed.append(fit)
        return load_file(_tensors(self.folder(units), units[-1]), str(self.footing.device))

    def _fit(self, footing: Footing, units: tuple[str, ...], before: State) -> None:
        """Trains, then writes the tensors and, last, fit.json."""
        maker, shelf = unit(units[-1]), footing.shelf
        if maker.needs_val:
            footing.need_val(maker.name)
        outer, self._borrowed, peak = self._borrowed, [], PeakMemory(footing.device)
        with shelf.tally() as tally, shelf.watched(peak):
            start = time.perf_counter()
            fit = maker.fit(footing, before)
            own = time.perf_counter() - start - tally.made + fit.seconds_before
        borrowed, self._borrowed = self._borrowed, outer
        peaks = [peak.bytes(), *(other["peak_bytes"] for other in borrowed)]
        shared = shelf.costs(tally)
        for other in borrowed:
            shared |= other["shared_seconds"]
        footing.folder.mkdir(parents=True, exist_ok=True)
        data = save({name: t.detach().cpu().contiguous() for name, t in fit.stored.items()})
        write_whole(_tensors(footing.folder, units[-1]), data)
        write_json(footing.folder / FIT_FILE, {
            "unit": units[-1], "stored_bytes": (len(data) if fit.stored else 0) + fit.files,
            "trained_parameters": fit.trained, "chosen": fit.chosen, "steps": fit.steps,
            "published_steps": fit.published_steps, "own_seconds": own, "shared_seconds": shared,
            "training_seconds": own + sum(shared.values()), "peak_bytes": None if None in peaks else max(peaks),
            "reused": tally.reused, "notes": list(fit.notes), "facts": fit.facts,
        })  # fmt: skip

    def _described(self, stack: Stack, units: tuple[str, ...]) -> dict[str, Any]:
        """What the units cost together, and what they are."""
        footing, config = self.footing, self.footing.config
        fits = [json.loads((self.folder(units[: n + 1]) / FIT_FILE).read_text()) for n in range(len(units))]
        peaks = [fit["peak_bytes"] for fit in fits]
        # What takes no step has no number of them to be cut from.
        published = [fit["published_steps"] for fit in fits if fit["steps"] or fit["published_steps"] is not None]
        # What two units used was made once.
        shared = {label: seconds for fit in fits for label, seconds in fit["shared_seconds"].items()}
        # A unit that was fitted for another method is reused by this one.
        earlier = [parse("+".join(units[: n + 1])).name for n in range(len(units) - 1)]
        facts = {name: value for fit in fits for name, value in fit["facts"].items()}
        return {
            "kind": "compare", "dataset": self.dataset, "task": "zeroshot_classification", "method": stack.name,
            "title": title(stack), "parts": list(stack.parts), "shots": config.shots, "seed": config.seed,
            "split": "test", "trained_parameters": sum(fit["trained_parameters"] for fit in fits),
            "stored_bytes": sum(fit["stored_bytes"] for fit in fits),
            "training_seconds": sum(fit["own_seconds"] for fit in fits) + sum(shared.values()),
            "own_seconds": fits[-1]["own_seconds"], "peak_bytes": None if None in peaks else max(peaks),
            "steps": sum(fit["steps"] for fit in fits),
            "published_steps": None if None in published or not published else sum(published),
            "chosen": {fit["unit"]: fit["chosen"] for fit in fits},
            "sources": {name: method(name).source for name in stack.parts},
            "notes": [note for fit in fits for note in fit["notes"]],
            "reused": list(dict.fromkeys([*(f"the {name} run" for name in earlier), *fits[-1]["reused"]])),
            "model": config.model, "pretrained": config.pretrained, "base_sha256": self.model_sha256,
            "indices_sha256": indices_sha256(footing.split.train, config), "config": dataclasses.asdict(config),
            "options": {**vars(self.options), "rates": dict(self.options.rates)}, "command": self.command,
            "environment": environment(footing.device), "classnames": list(footing.split.classnames), **facts,
        }  # fmt: skip

    def _measured(self, state: State) -> dict[str, Any]:
        """Accuracy on the test images, the worst classes, and the rate of inference."""
        footing = self.footing
        features, labels = footing.features(state, "test"), footing.labels("test")
        with torch.no_grad():
            logits = torch.cat([state.logits(part).float().cpu() for part in features.split(1000)])
        counted = accuracy(lambda rows: rows, [(logits, labels.cpu())], footing.classes, torch.device("cpu"))
        return {
            "metrics": counted.metrics(), "per_class": counted.per_class, "confusion": counted.confusion.tolist(),
            "worst": self._worst(logits, counted.per_class), "images_per_second": self._speed(state),
        }  # fmt: skip

    def _worst(self, logits: Tensor, per_class: Sequence[float | None]) -> list[dict[str, Any]]:
        """The classes with the lowest accuracy, and the images that are most surely taken for another."""
        names, items = self.footing.split.classnames, self.footing.split.test
        confidence, predicted = logits.softmax(-1).max(-1)
        order = confidence.argsort(descending=True, stable=True).tolist()
        worst = sorted((share, label) for label, share in enumerate(per_class) if share is not None)[:WORST]
        return [{
            "class": names[label], "acc1": share, "images": [
                {"path": items[i].path, "predicted": names[predicted[i]], "confidence": float(confidence[i])}
                for i in order if items[i].label == label and predicted[i] != label
            ][:EXAMPLES],
        } for share, label in worst]  # fmt: skip

    @torch.no_grad()
    def _speed(self, state: State) -> float:
        """Images a second from pixels to logits, one batch after the other."""
        device = self.footing.device
        image = next(iter(self.footing.images("test")))[:SPEED_IMAGES].to(device)

        def once() -> float:
            start = time.perf_counter()
            state.logits(encode(state.model, image)).cpu()
            return time.perf_counter() - start

        once()
        taken = [once()]
        while sum(taken) < SPEED_SECONDS or len(taken) < 3:
            taken.append(once())
        return len(image) / sorted(taken)[len(taken) // 2]


def units_of(stack: Stack) -> tuple[str, ...]:
    """`coop+ramt` -> one unit, since both are trained together; `tip+ramt` -> ramt, then tip."""
    if not stack.joint:
        return stack.parts
    return (parse("+".join(stack.parts[:2])).name, *stack.parts[2:])


def unit(name: str) -> Method:
    """A method by a unit's name."""
    if "+" not in name:
        return method(name)
    from .joint import Joint

    return Joint(*(method(part) for part in parse(name).parts))


def title(stack: Stack) -> str:
    """For people: CoOp + R-AMT."""
    return " + ".join(method(name).title for name in stack.name.split("+"))


def _tensors(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
