"""Writing files whole or not at all, hashes of tensors, and what a result must say of where it was made."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

import rmt_kernels as rk


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` whole or not at all: after any crash `path` holds its old content or the new.

    Raises: OSError that names `path`; no other file is left then.
    """
    write_together({Path(path): data})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes several files, each whole or not at all, and none before all of them are on the disk under other names.

    So a full disk changes nothing; only a crash between two renames, in the order given, can leave new beside old.

    Raises: OSError that names the path; no other file is left then.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            _stage(path, data, temporaries)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # What write() raises names no file, and what replace() raises the temporary one.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_folder(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """`write_together` of files in `folder`, by name. A folder made for them goes again if they cannot be written."""
    with _made(Path(folder)):
        write_together({Path(folder) / name: data for name, data in contents.items()})


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to write into, which in the end becomes `folder`: new, or empty so far.

    A link stays, and the folder that it points to is meant. If anything is raised inside, nothing is left of it.
    """
    folder = folder.resolve()
    with _made(folder.parent):
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            yield temporary
            for path in temporary.iterdir():
                # safetensors makes files that only their owner can read, as mkdtemp its folder.
                os.chmod(path, 0o666 & ~_umask())
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o777 & ~_umask())
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes `folder` where it is missing; if anything is raised inside, what was made goes again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _stage(path: Path, data: bytes, temporaries: dict[Path, Path]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporaries[path] = Path(temporary)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    # mkstemp makes files that only their owner can read.
    os.chmod(temporary, 0o666 & ~_umask())


def write_json(path: str | Path, value: object) -> None:
    """`value` as indented JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def open_rows(path: Path, done: int) -> TextIO:
    """A JSON-lines file cut back to its rows up to step `done`, open for more. A row cut short by a kill goes too."""
    rows = path.read_text().splitlines(keepends=True) if done and path.is_file() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= done]
    write_whole(path, "".join(kept).encode())
    return open(path, "a")


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over key, shape and little-endian bytes of every tensor, in the order of their keys."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        array = tensors[key].detach().cpu().contiguous().numpy()
        digest.update(f"{key} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, str | None]:
    """Versions, commit, date and machine: what a result needs beside its config to be understood later."""
    packages = ("rmt", "torch", "open_clip_torch", "numpy", "torchvision")
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(), "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backends": ", ".join(sorted({row["last"] for row in rk.explain()} - {""})),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this code runs from, with `+` where it is changed; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
