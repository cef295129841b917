"""Files: which there are, their bytes, kept in memory up to a limit, their text and their pixels."""

import os
import threading
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..config import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def files_in(folder: str | Path) -> list[str]:
    """Sorted names of the image files in a folder, hidden ones left out. Raises UserError as `need_utf8`."""
    return need_utf8(folder, sorted(n for n in os.listdir(folder) if n.lower().endswith(SUFFIXES) and n[0] != "."))


def need_utf8(folder: str | Path, names: list[str]) -> list[str]:
    """The names. Raises UserError for one that no JSON, task file or page could hold."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"names in {folder} must be UTF-8, got {os.fsencode(name)!r}: rename it") from None
    return names


def missing(paths: Sequence[str]) -> list[str]:
    """The paths at which there is no file, in order.

    Every folder is listed once: asking for each path takes minutes where a million of them lie on a network disk.
    """
    listed = {folder: _listed(folder) for folder in {os.path.dirname(path) for path in paths}}
    return [path for path in paths if os.path.basename(path) not in listed[os.path.dirname(path)]]


def _listed(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def decode(source: str | bytes, path: str) -> Image.Image:
    """An RGB image from a file's path or its bytes. Raises UserError that names the file where it cannot be read."""
    if source == b"":
        raise UserError(f"{path} cannot be read as an image: the file is empty")
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow names the place in memory where it met an unknown format.
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read as an image: {why}") from error


# Files whose bytes this process was handed in place of a disk, by path.
HANDED: dict[str, memoryview] = {}


def read_bytes(path: str) -> bytes:
    """A file's bytes. Raises UserError that names the file where it cannot be read."""
    if (handed := HANDED.get(path)) is not None:
        return bytes(handed)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """A file's text in UTF-8. Raises UserError that names the file where it cannot be read."""
    try:
        # utf-8-sig: what spreadsheets write starts with a mark.
        return read_bytes(str(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


class Cache:
    """The encoded bytes of image files, read once and kept while they take no more than `limit` bytes together."""

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit, self.size = limit, 0
        self._kept: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def read(self, path: str) -> bytes:
        """Raises UserError that names the file where it cannot be read."""
        if path in self._kept:
            return self._kept[path]
        data = read_bytes(path)
        with self._lock:
            if path not in self._kept and self.size + len(data) <= self.limit:
                self._kept[path] = data
                self.size += len(data)
        return data
