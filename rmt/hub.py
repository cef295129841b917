"""Tasks on the Hugging Face hub: a repository holds a task folder's two files, the mask and its card.

rmt.hub.resolve("user/name@v1")                    # -> the mask file, downloaded once, its bytes checked
rmt.hub.HubTask.of("runs/a").push_to_hub("user/name")
rmt.MaskModel.from_pretrained(model, "user/name", revision="v1")

huggingface_hub is imported here, and this file only by who uses the hub. Its environment variables count: HF_ENDPOINT,
HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download, utils

from .card import card
from .checkpoint import CARD_FILE, MASK_FILE, Task, load_task, write_task
from .config import UserError
from .files import write_folder
from .hub_id import EXPECTED, split_id

# Where what goes wrong on the way comes from; httpx and httpx2 belong to huggingface_hub from 1.0 on, requests to 0.x.
_CARRIERS = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet"}


def resolve(
    path_or_id: str | Path, *, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None, local_files_only: bool = False, force_download: bool = False,
) -> Path:  # fmt: skip
    """Where a task is: a path that exists as it is, or else the mask file of the hub's user/name, in the local cache.

    A download is compared with the hash that the hub names it by; one that differs is removed again. What is in the
    file is checked by `load_task`, which every reader calls.

    Args:
        path_or_id: a local path wins. user/name, hf-hub:user/name or user/name@revision otherwise.
        revision, token, cache_dir, local_files_only, force_download: as for huggingface_hub's hf_hub_download.

    Raises: UserError where there is none, or the hub cannot be reached, or sends something else than it says.
    """
    if Path(path_or_id).exists():
        return Path(path_or_id)
    repo, pinned = split_id(path_or_id)
    if pinned and revision and pinned != revision:
        raise UserError(f"one revision is expected, got {path_or_id} and revision {revision!r}")
    options = {"revision": pinned or revision, "token": token, "cache_dir": cache_dir}
    with _told(path_or_id):
        found = hf_hub_download(
            repo, MASK_FILE, local_files_only=local_files_only, force_download=force_download, **options
        )
    _need_its_hash(Path(found), path_or_id)
    return Path(found)


def _need_its_hash(path: Path, name: str | Path) -> None:
    """The cache calls a file's content by its ETag: sha256 of an LFS file, git's sha1 of another."""
    blob = path.resolve()
    data = blob.read_bytes()
    kinds = {64: lambda: hashlib.sha256(data), 40: lambda: hashlib.sha1(b"blob %d\0" % len(data) + data)}
    if not re.fullmatch("[0-9a-f]+", blob.name) or len(blob.name) not in kinds:
        return  # A cache without links, as on Windows: the file has its own name, and load_task checks what it holds.
    if (got := kinds[len(blob.name)]().hexdigest()) != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise UserError(f"the hub's {name} must have the hash {blob.name}, got {got}: what came was removed, try again")


@contextlib.contextmanager
def _told(name: str | Path) -> Iterator[None]:
    """huggingface_hub's errors as UserError: what was expected of `name`, and what came."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _of_the_way(error):
            raise
        raise UserError(_reason(str(name), error)) from error


def _of_the_way(error: Exception) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    # ValueError is what huggingface_hub raises where the hub answers something else than its protocol says.
    return isinstance(error, OSError | ValueError) or bool(modules & _CARRIERS)


def _reason(name: str, error: Exception) -> str:
    detail = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, utils.GatedRepoError):
        return f"the hub's repository {name} is gated: ask for access on its page, and log in (hf auth login)"
    if isinstance(error, utils.RepositoryNotFoundError):
        return f"{EXPECTED}, but nothing is at {name}, and the hub has no such repository, or none that you may see"
    if isinstance(error, utils.RevisionNotFoundError):
        return f"the hub's repository {name} has no such revision: {detail}"
    if isinstance(error, utils.LocalEntryNotFoundError):
        return (
            f"{EXPECTED}, but nothing is at {name}; as a hub id it is not in the local cache, and the hub cannot "
            f"be reached, or was not to be asked: {detail}"
        )
    if isinstance(error, utils.EntryNotFoundError):
        return f"the hub's repository {name} is no task: it has no {MASK_FILE}"
    if isinstance(error, utils.HFValidationError):
        return f"{EXPECTED}, got {name!r}: {detail}"
    return f"the hub has failed for {name}: {detail}"


class HubTask(ModelHubMixin, library_name="rmt", tags=["clip", "mask-tuning"]):
    """A task by huggingface_hub's verbs: `save_pretrained`, `push_to_hub` and `from_pretrained` are its mixin's.

    `HubTask.of` makes one. task: what the mask file holds. files: the bytes that are pushed, by name.
    """

    task: Task
    files: dict[str, bytes]

    @classmethod
    def of(cls, source: str | Path | Task, numbers: Mapping[str, float | str] | None = None) -> "HubTask":
        """Of a task folder or mask file, byte for byte, or of a `Task`, which is written first.

        numbers: rows of the card; an existing card beside a mask file is kept as it is without them.

        Raises: UserError where there is no task, or a damaged one.
        """
        made = cls()
        if isinstance(source, Task):
            with tempfile.TemporaryDirectory() as folder:
                made.task = write_task(folder, source, numbers)
                made.files = {name: (Path(folder) / name).read_bytes() for name in (CARD_FILE, MASK_FILE)}
            return made
        made.task = load_task(source)
        mask, beside = made.task.path.read_bytes(), made.task.path.with_name(CARD_FILE)
        text = beside.read_bytes() if beside.is_file() and not numbers else b""
        # A README beside a lone file may be of anything.
        if made.task.bits_sha256.encode() not in text:
            text = card(made.task, len(mask), numbers or {}).encode()
        made.files = {CARD_FILE: text, MASK_FILE: mask}
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "HubTask":
        """A task folder or the hub's user/name, as `resolve` takes them. options: `resolve`'s.

        Raises: UserError.
        """
        path = resolve(pretrained_model_name_or_path, **options)
        if not Path(pretrained_model_name_or_path).exists():
            repo, pinned = split_id(pretrained_model_name_or_path)
            # The card of the very same commit, where there is one.
            options = options | {"revision": _commit(path) or pinned or options.get("revision")}
            with contextlib.suppress(UserError), _told(repo):
                hf_hub_download(repo, CARD_FILE, **options)
        return cls.of(path)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self.files)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Makes the repository where it is missing, and one commit of the two files. Returns the commit's address.

        options: huggingface_hub's: private, token, branch, commit_message, create_pr.

        Raises: UserError where the id is none, or the hub refuses or cannot be reached; no commit is made then.
        """
        repo, pinned = split_id(repo_id)
        if pinned:
            raise UserError(f"to push takes user/name, and the option branch, got {repo_id!r}")
        options = {"commit_message": f"Masks with bits_sha256 {self.task.bits_sha256}"} | options
        with _told(repo_id):
            return str(super().push_to_hub(repo, **options))


def _commit(path: Path) -> str | None:
    """Of a file in the cache: .../snapshots/COMMIT/mask.safetensors."""
    return path.parent.name if path.parent.parent.name == "snapshots" else None
