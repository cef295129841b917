"""Tasks made of tasks: what any, all, only the first or most of them switch off, on one base model.

union         off where any task has it off
intersection  off where all have
difference    off where the first has, and no other
vote          off where at least `votes` of them have (default: more than half): the seeds of one task, as one

The masks are set algebra; that the result is any good is to be measured, not given.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rmt_kernels as rk

from .checkpoint import Task, count_on
from .compare_tasks import need_comparable, task_name
from .config import UserError
from .files import sha256

OPERATIONS = ("union", "intersection", "difference", "vote")


def compose(
    operation: str, tasks: Sequence[Task], votes: int | None = None, classnames: Sequence[str] | None = None,
    template: str | None = None,
) -> Task:  # fmt: skip
    """The task that `operation` makes of two or more. In memory: `rmt.checkpoint.write_task` writes it.

    Class names, template, text features and names of the base model are kept where all tasks agree on them; text
    features only with the class names and template that they are of. init and threshold, which only further tuning
    reads, are the first task's. Its config says under `composed` what it was made of.

    Args:
        votes: of a vote: how many tasks must have a weight off, 1 to their number; default: more than half.
        classnames, template: in place of the tasks' own.

    Raises: UserError for an unknown operation, fewer than two tasks, tasks of two base models, votes out of range.
    """
    need = _needed(operation, len(tasks), votes)
    first = tasks[0]
    for other in tasks[1:]:
        need_comparable(first, other)
    bits = {key: _composed(operation, [task.bits[key] for task in tasks], first.shapes[key], need)
            for key in first.bits}  # fmt: skip
    names, prompt = _common(tasks, "classnames"), _common(tasks, "template")
    own = classnames is None and template is None and names is not None and prompt is not None
    parts = [{"name": task_name(task.path), "bits_sha256": task.bits_sha256} for task in tasks]
    composed = {"operation": operation, "of": parts} | ({"votes": need} if operation == "vote" else {})
    return Task(
        path=Path(f"{operation} of {', '.join(part['name'] for part in parts)}"),
        bits=bits, shapes=dict(first.shapes), selected=_selected(operation, tasks, bits),
        init=first.init, threshold=first.threshold, bits_sha256=sha256(bits), base_sha256=first.base_sha256,
        model=_common(tasks, "model"), pretrained=_common(tasks, "pretrained"),
        classnames=tuple(classnames if classnames is not None else names or ()), template=template or prompt,
        config=_config(tasks) | {"composed": composed}, text_features=_text_features(tasks) if own else None,
    )  # fmt: skip


def _needed(operation: str, count: int, votes: int | None) -> int | None:
    """Votes of a vote, else None."""
    if operation not in OPERATIONS:
        raise UserError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    if count < 2:
        raise UserError(f"{operation} needs two tasks or more, got {count}")
    if operation != "vote":
        if votes is not None:
            raise UserError(f"votes are of the operation vote, got {votes!r} for {operation}")
        return None
    votes = count // 2 + 1 if votes is None else votes
    if not isinstance(votes, int) or isinstance(votes, bool) or not 1 <= votes <= count:
        raise UserError(f"votes must be 1 to {count}, the number of tasks, got {votes!r}")
    return votes


def _composed(operation: str, words: Sequence[Tensor], shape: tuple[int, int], votes: int | None) -> Tensor:
    """Words of one mask from those of all tasks; a bit set means on."""
    made = words[0].clone()
    if operation == "vote":
        off = torch.zeros(shape, dtype=torch.int32)
        for one in words:
            off += ~rk.unpack_bits(one, shape[1])
        return rk.pack_bits(off < votes)
    for one in words[1:]:
        if operation == "union":
            made &= one
        elif operation == "intersection":
            made |= one
        else:
            made |= ~one
    # ~ has set the bits beyond the last column, which must be 0.
    return made & rk.pack_bits(torch.ones(shape, dtype=torch.bool)) if operation == "difference" else made


def _selected(operation: str, tasks: Sequence[Task], bits: dict[str, Tensor]) -> dict[str, int]:
    """How many weights could be off. A file says how many were selected, not which: kept only where it must hold."""
    found = {}
    for key, (n, k) in tasks[0].shapes.items():
        counts = {task.selected.get(key, n * k) for task in tasks[: 1 if operation == "difference" else None]}
        count = counts.pop()
        if not counts and n * k - count_on(bits[key]) <= count < n * k:
            found[key] = count
    return found


def _config(tasks: Sequence[Task]) -> dict[str, Any]:
    """What loading needs of a run's config; how the parts were tuned stays in their own files."""
    first = tasks[0]
    config: dict[str, Any] = {"mask": {"init": first.init, "threshold": first.threshold}}
    for name in ("mask", "image_size"):
        values = [task.config.get(name) for task in tasks]
        if values[0] is not None and all(value == values[0] for value in values):
            config[name] = values[0]
    return config


def _common(tasks: Sequence[Task], name: str, equal: Callable[[Any, Any], bool] = lambda a, b: a == b) -> Any:
    """The field's value where all tasks have the same, else None."""
    values = [getattr(task, name) for task in tasks]
    return values[0] if all(equal(values[0], value) for value in values[1:]) else None


def _text_features(tasks: Sequence[Task]) -> Tensor | None:
    same = all(task.text_features is not None for task in tasks)
    return _common(tasks, "text_features", torch.equal) if same else None
