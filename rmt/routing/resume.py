"""The resume file of a routing run: what a killed run needs to end with the same bits as an unbroken one."""

import io
import pickle
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..config import UserError, same_yaml
from ..files import write_whole

VERSION = 1


class RoutingResume:
    """Reads and writes one resume file: trained parameters, Adam's moments, the step, seconds, a fingerprint.

    Batches and dropout are functions of seed and step, so that there is no other random state.

    Args:
        path: of the file. fingerprint: texts that say which run this is, by name; a file with others is refused.
        every: seconds between two writings; 0 writes after every step.

    Raises: UserError where the file is damaged or another run's.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, str], every: float) -> None:
        self.path, self.fingerprint, self.every = Path(path), dict(fingerprint), every
        self._state = self._read()
        self.steps_done: int = self._state["step"] if self._state else 0
        self._before: float = self._state["seconds"] if self._state else 0.0
        self._start = self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """From this object's making to now, and those of the calls before it."""
        return self._before + time.monotonic() - self._start

    def load(self, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Fills parameters and moments, where there is a file. Raises UserError where its parameters are others."""
        state, self._state = self._state, None
        if state is None:
            return
        if {n: p.shape for n, p in named.items()} != {n: p.shape for n, p in state["parameters"].items()}:
            raise UserError(f"{self.path} is another run's: its {len(state['parameters'])} parameters are others")
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])

    def save(
        self, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, *, last: bool = False
    ) -> None:
        """Writes the file, whole or not at all, if its time has come."""
        if not last and time.monotonic() - self._written < self.every:
            return
        state = {
            "version": VERSION, "fingerprint": self.fingerprint, "step": step, "seconds": self.seconds,
            "parameters": {name: p.detach() for name, p in named.items()}, "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path, buffer.getbuffer())
        self._written = time.monotonic()

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
        from .run_config import RouteConfig  # which imports the loop, and that this file

        for name, mine in self.fingerprint.items():
            # Older files lack some names: they say nothing of these.
            theirs = state["fingerprint"].get(name, mine)
            if not (same_yaml(theirs, mine, RouteConfig) if name == "config" else theirs == mine):
                raise UserError(f"{self.path} is another run's: {name} was {theirs!r}, now it is {mine!r}")
        return state
