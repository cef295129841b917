"""What `MaskModel` and `TaskBank` share: a module around a model, whose calls and attributes are the model's."""

from typing import Any

from torch import nn


class Wrapping(nn.Module):
    """A subclass sets `model`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `model` itself is missing while pickle or copy builds an object.
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
