"""What an id of a task on the hub looks like; huggingface_hub is not needed to tell one from a path."""

import re
from pathlib import Path

from .config import UserError

EXPECTED = "expected a task folder, its mask.safetensors, or the id user/name[@revision] of a task on the hub"
_PREFIX = "hf-hub:"
# As the hub has them: parts of letters, digits, - _ ., neither beginning nor ending with - or . .
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?:{_PREFIX})?({_PART}/{_PART})(?:@([^@\s]+))?", re.ASCII)


def is_id(text: str | Path) -> bool:
    """Whether it has the form of an id, user/name[@revision], with hf-hub: before it or without."""
    return _ID.fullmatch(str(text)) is not None


def split_id(text: str | Path) -> tuple[str, str | None]:
    """(user/name, revision or None). Raises UserError for anything else."""
    match = _ID.fullmatch(str(text))
    if match is None or ".." in match[1] or "--" in match[1]:
        raise UserError(f"{EXPECTED}, got {str(text)!r}")
    return match[1], match[2]


def task_source(path_or_id: str | Path) -> Path:
    """A path that exists or is no id as it is; of an id the mask file, downloaded where needed: `rmt.hub.resolve`."""
    path = Path(path_or_id)
    if path.exists() or not is_id(path_or_id):
        return path
    from .hub import resolve

    return resolve(path_or_id)
