"""Routed LoRA and routed adapters put into a host, saved, loaded, and taken out again.

routed = inject_routed_lora(model, RoutedLoRAConfig(function="mul", r=16))
optimizer = torch.optim.AdamW(routed.parameters(), lr=1e-3)
...                                    # model(image, text) as before: the image reaches the branches by itself
routed.save("routed")
routed.remove()                        # the host is as it was, bit for bit
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..config import UserError
from ..files import write_folder
from ..masked import masks
from .attention import routed_class
from .base import Base, base_of
from .config import RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .context import Leave, VisualContext
from .fold import fold
from .functions import MANY
from .hooks import Adapt, Add, Call
from .hosts import Host, describe
from .plan import adapter_plan, chosen, lora_plan
from .watch import watch_block

FILE, CONFIG = "routed.safetensors", "routed_config.json"
KINDS = {"lora": RoutedLoRAConfig, "adapter": RoutedAdapterConfig}
_ATTRIBUTE = "_rmt_routed"


def inject_routed_lora(model: nn.Module, config: RoutedLoRAConfig | None = None) -> "Routed":
    """LoRA on the config's sites of every layer. The host is frozen; it computes what it did until B is trained.

    Raises: UserError where `model` is no host, has routed LoRA already, or lacks a site; it is then as it was.
    """
    return Routed(model, config or RoutedLoRAConfig())


def inject_routed_adapter(model: nn.Module, config: RoutedAdapterConfig | None = None) -> "Routed":
    """An adapter behind attention and MLP of every layer. Otherwise as `inject_routed_lora`."""
    return Routed(model, config or RoutedAdapterConfig())


class Routed:
    """What was injected. `inject_routed_lora` and `inject_routed_adapter` are the ways to one."""

    def __init__(self, model: nn.Module, config: RoutedConfig) -> None:
        # A model around another, as rmt's MaskModel: names are the inner one's.
        model = getattr(model, "mask_root", model)
        _need_eager(model)
        self.model, self.config, self._host = model, config, describe(model)
        others: list[Routed] = model.__dict__.get(_ATTRIBUTE, [])
        if any(type(other.config) is type(config) for other in others):
            raise UserError(f"the model has routed {self.kind} already: remove() it first")
        blocks = chosen(self.host, config)
        plan = lora_plan(blocks, config) if self.kind == "lora" else adapter_plan(blocks, config)
        self._names = {module: name for name, module in model.named_modules()}
        self.context_of_calls = VisualContext(self.host.width, config.function in MANY)
        self._handles: list = []
        self._classes: list[tuple[nn.Module, type]] = []
        self.children: list[tuple[nn.Module, str]] = []
        # Masks and other injections stay in training beside this one.
        tuned = {id(mask.scores) for mask in masks(model)} | {id(p) for other in others for p in other.parameters()}
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in tuned]
        for p in self._frozen:
            p.requires_grad_(False)
        random, drawn = torch.Generator().manual_seed(config.seed), set()
        for parent, name, child in plan(self.context_of_calls):
            if child not in drawn:
                child.reset(random)
                like = next(parent.parameters(), next(model.parameters()))
                child.to(like.device, like.dtype).train(parent.training)
                drawn.add(child)
            parent.add_module(name, child)
            self.children.append((parent, name))
        for block in blocks:
            for unit in block.units:
                self._handles += watch_block(unit, self.context_of_calls, block.visual)
        self._hook_sites()
        self._hook_root()
        model.__dict__.setdefault(_ATTRIBUTE, []).append(self)

    def __getstate__(self) -> dict:
        # A host's functions may be closures, which belong to one model and cannot be pickled.
        return self.__dict__ | {"_host": None}

    @property
    def host(self) -> Host:
        """What `describe` says of the model."""
        if self._host is None:
            self._host = describe(self.model)
        return self._host

    @property
    def kind(self) -> str:
        """lora or adapter."""
        return "lora" if isinstance(self.config, RoutedLoRAConfig) else "adapter"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, by their state-dict names in the model: a shared adapter's by its first."""
        seen: set[int] = set()
        for parent, name in self.children:
            for key, p in getattr(parent, name).named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield ".".join(filter(None, (self._names[parent], name, key))), p

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (p for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """What was trained: the injected parameters alone."""
        return {name: p.detach() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError for other names or shapes; nothing is loaded then."""
        mine = dict(self.named_parameters())
        if odd := set(mine) ^ set(state):
            raise UserError(f"expected the parameters of this injection, but {sorted(odd)[0]} is in one alone")
        for name, p in mine.items():
            if state[name].shape != p.shape:
                raise UserError(f"{name} must be {tuple(p.shape)}, got {tuple(state[name].shape)}")
        for name, p in mine.items():
            p.copy_(state[name])

    def base(self, without: Collection[str] | None = None) -> Base:
        """Of the host's own parameters; `without` are left out, by default those that are trained beside this."""
        added = [mask.scores for mask in masks(self.model)] + [p for one in self.stack for p in one.parameters()]
        added = set(map(id, added))
        own = {name: p for name, p in self.model.named_parameters() if p.numel() and id(p) not in added}
        return base_of(own, [name for name, p in own.items() if p.requires_grad] if without is None else without)

    def save(self, folder: str | Path) -> None:
        """Writes routed.safetensors and routed_config.json, together or not at all.

        Reads all weights of the host for their hash, by which `load_routed` knows it: seconds where it is large.
        """
        config = {"kind": self.kind, **dataclasses.asdict(self.config), "host": dataclasses.asdict(self.base())}
        data = save({name: p.cpu().contiguous() for name, p in self.state_dict().items()})
        write_folder(Path(folder), {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), FILE: data})

    @contextlib.contextmanager
    def context(self, x: Tensor) -> Iterator[None]:
        """Inside, x (B, d) or (B, V, d) is the visual context, whatever image the host is called with."""
        with self.context_of_calls.set(x):
            yield

    def remove(self) -> None:
        """Takes everything out: the host is as before, bit for bit, and its parameters train again that did, unless
        it has masks, which keep it frozen.

        Raises: UserError where something was injected after this, which must be removed first, or it is out already.
        """
        stack = self.stack
        if stack[-1] is not self:
            raise UserError(f"routed {stack[-1].kind} was injected after this {self.kind}: remove() that first")
        for handle in self._handles:
            handle.remove()
        for module, before in self._classes:
            module.__class__ = before
        for parent, name in self.children:
            delattr(parent, name)
        if not masks(self.model):
            for p in self._frozen:
                p.requires_grad_(True)
        stack.pop()
        if not stack:
            del self.model.__dict__[_ATTRIBUTE]

    def fold_for(self, image: Tensor | None = None, *, x: Tensor | None = None) -> nn.Module:
        """A plain copy of the model, in eval mode, that computes for any text what this one does with that image.

        W <- W + scale B M A and b <- b + scale B c at every site, with M, c of `rmt.routing.matrix`; nothing injected
        is left, so that a token costs what it costs the host. Masks stay. It is right for that image alone. Dropout
        is off, as in eval mode.

        Args:
            image: (3, H, W) or (1, 3, H, W), preprocessed. x: in its place the visual feature, (d,), (1, d) or
                (1, V, d), as for `context`.

        Raises: UserError for adapters and relu, which are no change of a weight; more than one image; an image where
            the host does not say how to encode it (`Host.encode`); a routed weight that another module shares.
        """
        return fold(self, image, x)

    @property
    def stack(self) -> list["Routed"]:
        """All injections of the model, this one too, in order. Raises UserError once this one is removed."""
        stack = self.model.__dict__.get(_ATTRIBUTE, [])
        if self not in stack:
            raise UserError("this injection was removed already")
        return stack

    def print_trainable_parameters(self) -> None:
        """Prints how many numbers are trained, and their share of the model's."""
        mine, total = (sum(p.numel() for p in ps) for ps in (self.parameters(), self.model.parameters()))
        share = 100 * mine / total
        print(f"routed     {self.kind}, {self.config.function}: {mine:,} of {total:,} parameters, {share:.2f} %")

    def _hook_sites(self) -> None:
        """Packed attention changes its class; a Linear gets a hook that adds its branches; an adapter's module too."""
        done: set[int] = set()
        for parent, name in self.children:
            if self.kind == "lora" and hasattr(parent, "in_proj_weight"):
                if id(parent) not in done:
                    self._classes.append((parent, parent.__class__))
                    parent.__class__ = routed_class(parent)
                    done.add(id(parent))
            else:
                hook = Adapt(name) if self.kind == "adapter" else Add(name)
                self._handles.append(parent.register_forward_hook(hook))

    def _hook_root(self) -> None:
        self._handles += [
            self.host.root.register_forward_pre_hook(Call(self), with_kwargs=True),
            self.host.root.register_forward_hook(Leave(self.context_of_calls), with_kwargs=True, always_call=True),
        ]

    def visual(self, args: tuple, kwargs: dict) -> Tensor | None:
        """x_R (B, V, d) of a call of the root, by `source`; None where the user must give it."""
        tokens = self.host.visual(args, kwargs)
        return None if tokens is None else self.reduced(tokens)

    def reduced(self, tokens: Tensor) -> Tensor:
        """What of the host's image tokens (B, V, d) is routed, by `source`."""
        if self.config.source == "tokens" or tokens.shape[1] == 1:
            return tokens
        return tokens[:, :1] if self.config.source == "first" else tokens.mean(1, keepdim=True)


def load_routed(model: nn.Module, folder: str | Path, allow_base_mismatch: bool = False) -> Routed:
    """Injects what `Routed.save` wrote. Where a host has other parts that were trained or drawn, fill them in first.

    Weights that were frozen must be those that it was trained on; in another dtype they are not compared, nor where the
    folder is from before their hash was kept.

    Args:
        allow_base_mismatch: use it on other weights of the same shapes, at one's own risk.

    Raises: UserError where it is missing, damaged or another host's; the model is then as it was.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / FILE)
        kind, host = KINDS[values.pop("kind")], values.pop("host", None)
        config = kind(**_tuples(values))
        base = None if host is None else Base(**_tuples(host))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} must hold {CONFIG} and {FILE} as Routed.save writes them: {error}") from error
    routed = Routed(model, config)
    try:
        routed.load_state_dict(state)
        if base is not None and not allow_base_mismatch:
            _need_base(routed, base, folder)
    except UserError:
        routed.remove()
        raise
    return routed


def _tuples(values: Mapping) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _need_base(routed: Routed, base: Base, folder: Path) -> None:
    if not base.may_be(mine := routed.base(base.without)):
        raise UserError(
            f"{folder} is for another host: expected weights with sha256 {base.weights}, got {mine.weights}. "
            "allow_base_mismatch uses it all the same"
        )


def _need_eager(model: nn.Module) -> None:
    """A compiled graph does not look for new hooks: an injection into one could go unseen."""
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if compiled or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UserError("the model is compiled already: inject first, and compile then")
