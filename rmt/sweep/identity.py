"""What makes two runs the same: sha256 of resolved configuration, data, the model's files and the code."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import RunConfig, UserError, meaning
from ..files import write_json
from .spec import FOLDER, Run

DATA_FILE = "data.json"
PACKAGES = ("torch", "open_clip_torch", "numpy")


def digest(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code_sha256() -> str:
    """Of the Python sources of rmt and rmt_kernels and of the versions they stand on, not of the compiled extension:
    that is built for each machine."""
    top = Path(__file__).parents[2]
    files = sorted(path for name in ("rmt", "rmt_kernels") for path in (top / name).rglob("*.py"))
    found = [(path.relative_to(top).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return digest([found, [(name, metadata.version(name)) for name in PACKAGES]])


class Contents:
    """Content hashes of data sets and of models' files, each read once and kept in `folder`/data.json.

    A kept hash holds while paths, sizes and times of change of all files are the same.

    Args:
        write: False: what is kept is read, and nothing is written. say: is told of work that takes long.
    """

    def __init__(self, folder: Path, write: bool = True, say: Callable[[str], None] = print) -> None:
        self.path, self.write, self.say = folder / DATA_FILE, write, say
        self._known: dict[str, dict] = {}
        self._now: dict[str, str] = {}
        if self.path.is_file():
            try:
                kept = json.loads(self.path.read_text())
                self._known = {key: dict(one) for key, one in kept.items()}
            except (ValueError, AttributeError, TypeError):
                say(f"damaged    {self.path} is made anew: the data are read again")

    def of_data(self, config: RunConfig) -> str:
        """Of the images, labels and class names of all parts. Raises UserError where they cannot be read."""
        key = f"data {config.data or f'{config.dataset} in {config.root}'}"
        if key not in self._now:
            from ..data import read

            split = read(config)
            base = config.root or config.data
            rows = [
                (part, os.path.relpath(item.path, base), item.label, item.classname)
                for part in ("train", "val", "test") for item in getattr(split, part)
            ]  # fmt: skip
            paths = list(dict.fromkeys(item.path for part in (split.train, split.val, split.test) for item in part))
            self._now[key] = self._kept(key, paths, [rows, split.template])
        return self._now[key]

    def of_model(self, config: RunConfig) -> str:
        """Of a model's own files; a name or tag of open_clip's stands for itself. Raises UserError."""
        paths = model_files(config)
        key = f"model {config.model} {config.pretrained}"
        if key not in self._now:
            self._now[key] = (
                self._kept(key, paths, [os.path.basename(path) for path in paths]) if paths else digest(key)
            )
        return self._now[key]

    def _kept(self, key: str, paths: list[str], meaning: object) -> str:
        stamps = [(path, *_stamp(path)) for path in paths]
        listing = digest([stamps, meaning])
        if self._known.get(key, {}).get("listing") != listing:
            if len(paths) > 1000:
                self.say(f"reading    {len(paths):,} files once, for the hash of {key}")
            contents = [_file_sha256(path) for path in paths]
            sizes = [size for _, size, _ in stamps]
            self._known[key] = {"listing": listing, "sha256": digest([meaning, sizes, contents]), "files": len(paths),
                                "bytes": sum(sizes)}  # fmt: skip
            if self.write:
                write_json(self.path, self._known)
        return self._known[key]["sha256"]


def model_files(config: RunConfig) -> list[str]:
    """The files that a run's model is read from, as far as its names tell; none for what open_clip downloads."""
    files = []
    if config.model.startswith(FOLDER):
        folder = Path(config.model.removeprefix(FOLDER))
        files = sorted(str(path) for path in folder.glob("*") if path.is_file())
        if not files:
            raise UserError(
                f"model must be a folder with a model in it, got {str(folder)!r}, which is missing or empty"
            )
    if config.pretrained is not None and os.path.isfile(config.pretrained):
        files.append(config.pretrained)
    return files


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def _file_sha256(path: str) -> str:
    made = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                made.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return made.hexdigest()


def _plain(value: Any) -> Any:
    """1.0 as 1: a config may be written with either."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def identify(run: Run, contents: Contents) -> dict[str, str]:
    """The parts of a run's identity, by name, and the whole of them as `id`. Raises UserError."""
    options, (config, stretched) = run.options and dataclasses.asdict(run.options), meaning(run.config)
    parts = {
        "config": digest(_plain([dataclasses.asdict(config), stretched, run.method, options])),
        "data": contents.of_data(run.config), "model": contents.of_model(run.config), "code": code_sha256(),
    }  # fmt: skip
    return {"id": digest(parts), **parts}
