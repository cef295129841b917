"""The resume file of a run: all that a killed run needs to end with the same bits as an unbroken one.

It holds scores, Adam's moments, the step (with it epoch and place in the epoch: batches, augmentation and draws are
functions of seed and step alone, so that there is no other random state), the bits of the last logged row, and a
fingerprint of the run. The task file holds none of this.
"""

import io
import pickle
import time
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import write_whole
from .config import UserError, same_yaml
from .optim import MaskAdam
from .world import World

VERSION = 2


class Resume:
    """Reads and writes one resume file.

    Args:
        path: of the file.
        fingerprint: texts that say which run this is, by name; a file with others is refused.
        every: seconds between two writings; 0 writes after every step.
        world: the processes of the run. Rank 0 alone reads and writes, and tells the others what it has read: the file
            needs to be seen by no other, and does not say how many ranks wrote it.

    Raises: UserError where the file is damaged or another run's.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, str], every: float, world: World | None = None) -> None:
        self.path, self.fingerprint, self.every = Path(path), fingerprint, every
        self.world = world or World()
        self._state = self.world.from_first(self._read)
        self._before = self._state["seconds"] if self._state else 0.0
        self._start = self._written = time.monotonic()

    @property
    def steps_done(self) -> int:
        """In the file as it was found; 0 without one."""
        return self._state["step"] if self._state else 0

    @property
    def seconds(self) -> float:
        """From this object's making to now, and those of the calls before it."""
        return self._before + time.monotonic() - self._start

    def load(self, optimizer: MaskAdam) -> list[Tensor] | None:
        """Fills scores and moments. Returns the bits of the last row; None without a file.

        Raises: UserError where the file's masks are not the model's.
        """
        state, self._state = self._state, None
        if state is None:
            return None
        shapes = {mask.key: mask.shape for mask in optimizer.masks}
        if shapes != {key: scores.shape for key, scores in state["scores"].items()}:
            raise UserError(f"{self.path} is another run's: its {len(state['scores'])} masks are not the model's")
        held, found = state["optimizer"], list(state["scores"].values())
        if optimizer.shards:
            found, held["state"] = optimizer.shards.part(found, held["state"])
        with torch.no_grad():
            for mask, scores in zip(optimizer.masks, found):
                mask.scores.copy_(scores)
        if optimizer.shards:
            optimizer.shards.follow()
        optimizer.load_state_dict(held)
        return state["logged"]

    def _read(self) -> dict | None:
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        # What torch.load raises on a file that is cut short or is none of its own: zip, unpickling, missing keys.
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path} is damaged: delete it to start the run anew ({error})") from error
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise UserError(f"{self.path} must be a resume file of version {VERSION}: delete it to start the run anew")
        for name, mine in self.fingerprint.items():
            # Older files lack some names: they say nothing of these.
            theirs = state["fingerprint"].get(name, mine)
            if not (same_yaml(theirs, mine) if name == "config" else theirs == mine):
                raise UserError(f"{self.path} is another run's: {name} was {theirs!r}, now it is {mine!r}")
        return state

    def save(self, optimizer: MaskAdam, step: int, logged: list[Tensor], *, last: bool = False) -> None:
        """Writes the file, whole or not at all, if its time has come.

        Where scores and moments are sharded rank 0 collects them: the file is as if it had them all. Its clock decides
        when, of which it tells the others in 8 bytes a step.
        """
        due = self.world.first and (last or time.monotonic() - self._written >= self.every)
        if optimizer.shards:
            due = self.world.sum([float(due)]) != [0.0]
        if not due:
            return
        scores, held = [mask.scores.detach() for mask in optimizer.masks], optimizer.state_dict()
        if optimizer.shards:
            optimizer.shards.collect(scores, held["state"])
        if not self.world.first:
            return
        state = {
            "version": VERSION, "fingerprint": self.fingerprint, "step": step, "logged": logged,
            "seconds": self.seconds, "scores": {mask.key: t for mask, t in zip(optimizer.masks, scores)},
            "optimizer": held,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path, buffer.getbuffer())
        self._written = time.monotonic()
