"""ImageNet's classes: WordNet ids and CLIP's names for them, both from packages that open_clip brings along.

CoOp's labels are the places of the sorted ids, and its `classnames.txt` holds open_clip's list word for word, so that
file is not needed. Names are not unique: missile and sunglasses are there twice.
"""

from importlib.util import find_spec
from pathlib import Path

from ..config import UserError


def wnids(variant: str = "") -> tuple[str, ...]:
    """Sorted WordNet ids: the 1000 of ImageNet, or the 200 of its variant `_a` or `_r`.

    Raises: UserError where timm is missing or too old.
    """
    # find_spec does not run timm, which takes seconds to import.
    found = find_spec("timm")
    path = Path(found.origin).parent / "data" / "_info" / f"imagenet{variant}_synsets.txt" if found else None
    if path is None or not path.is_file():
        raise UserError(
            f"ImageNet's classes need timm 0.9 or newer, which open_clip requires; {path or 'none'} is missing"
        )
    return tuple(path.read_text().split())


def names() -> dict[str, str]:
    """WordNet id -> class name, in label order."""
    from open_clip import IMAGENET_CLASSNAMES

    return dict(zip(wnids(), IMAGENET_CLASSNAMES, strict=True))
