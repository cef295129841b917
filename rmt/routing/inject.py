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
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..config import UserError
from ..files import write_folder
from .attention import PREFIX, routed_class
from .config import RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .context import VisualContext, watch_block
from .functions import MANY
from .hosts import Block, Host, Site, describe
from .layers import Adapter, LowRank

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
        self.model, self.config, self.host = model, config, describe(model)
        stack: list[Routed] = model.__dict__.setdefault(_ATTRIBUTE, [])
        if any(type(other.config) is type(config) for other in stack):
            raise UserError(f"the model has routed {self.kind} already: remove() it first")
        blocks = _chosen(self.host, config)
        plan = _lora_plan(blocks, config) if self.kind == "lora" else _adapter_plan(blocks, config)
        self._names = {module: name for name, module in model.named_modules()}
        self.context_of_calls = VisualContext(self.host.width, config.function in MANY)
        self._undo: list = []
        self._children: list[tuple[nn.Module, str]] = []
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(config.seed)
        for parent, name, child in plan(self.context_of_calls):
            child.reset(random)
            like = next(self.model.parameters())
            parent.add_module(name, child.to(like.device, like.dtype).train(parent.training))
            self._children.append((parent, name))
        for block in blocks:
            for unit in block.units:
                self._undo += [handle.remove for handle in watch_block(unit, self.context_of_calls)]
        self._hook_sites(blocks)
        self._hook_root()
        stack.append(self)

    @property
    def kind(self) -> str:
        """lora or adapter."""
        return "lora" if isinstance(self.config, RoutedLoRAConfig) else "adapter"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, by their state-dict names in the model."""
        for parent, name in self._children:
            for key, p in getattr(parent, name).named_parameters():
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

    def save(self, folder: str | Path) -> None:
        """Writes routed.safetensors and routed_config.json, together or not at all."""
        config = {"kind": self.kind, **dataclasses.asdict(self.config)}
        data = save({name: p.cpu().contiguous() for name, p in self.state_dict().items()})
        write_folder(Path(folder), {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), FILE: data})

    @contextlib.contextmanager
    def context(self, x: Tensor) -> Iterator[None]:
        """Inside, x (B, d) or (B, V, d) is the visual context, whatever image the host is called with."""
        with self.context_of_calls.set(x, fixed=True):
            yield

    def remove(self) -> None:
        """Takes everything out: the host is as before, bit for bit, and its parameters train again that did.

        Raises: UserError where something was injected after this, which must be removed first, or it is out already.
        """
        stack = self.model.__dict__.get(_ATTRIBUTE, [])
        if self not in stack:
            raise UserError("this injection was removed already")
        if stack[-1] is not self:
            raise UserError(f"routed {stack[-1].kind} was injected after this {self.kind}: remove() that first")
        for undo in reversed(self._undo):
            undo()
        for parent, name in self._children:
            delattr(parent, name)
        for p in self._frozen:
            p.requires_grad_(True)
        stack.pop()

    def print_trainable_parameters(self) -> None:
        """Prints how many numbers are trained, and their share of the model's."""
        mine, total = (sum(p.numel() for p in ps) for ps in (self.parameters(), self.model.parameters()))
        share = 100 * mine / total
        print(f"routed     {self.kind}, {self.config.function}: {mine:,} of {total:,} parameters, {share:.2f} %")

    def _hook_sites(self, blocks: tuple[Block, ...]) -> None:
        """Packed attention changes its class; a Linear gets a hook that adds its branches; an adapter's module too."""
        done: set[int] = set()
        for parent, name in self._children:
            if self.kind == "adapter":
                handle = parent.register_forward_hook(_adapt(name))
                self._undo.append(handle.remove)
            elif hasattr(parent, "in_proj_weight"):
                if id(parent) not in done:
                    before = parent.__class__
                    parent.__class__ = routed_class(parent)
                    self._undo.append(lambda parent=parent, before=before: setattr(parent, "__class__", before))
            else:
                handle = parent.register_forward_hook(_add(name))
                self._undo.append(handle.remove)
            done.add(id(parent))

    def _hook_root(self) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.context_of_calls.push(lambda: self._visual(args, kwargs))

        def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            self.context_of_calls.pop()

        handles = [
            self.host.root.register_forward_pre_hook(before, with_kwargs=True),
            self.host.root.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self._undo += [handle.remove for handle in handles]

    def _visual(self, args: tuple, kwargs: dict) -> Tensor | None:
        """x_R (B, V, d) of a call of the root."""
        tokens = self.host.visual(args, kwargs)
        if tokens is None or self.config.source == "tokens" or tokens.shape[1] == 1:
            return tokens
        return tokens[:, :1] if self.config.source == "first" else tokens.mean(1, keepdim=True)


def load_routed(model: nn.Module, folder: str | Path) -> Routed:
    """Injects what `Routed.save` wrote. Raises UserError where it is missing, damaged or another host's."""
    folder = Path(folder)
    try:
        values = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / FILE)
        kind = KINDS[values.pop("kind")]
        config = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} must hold {CONFIG} and {FILE} as Routed.save writes them: {error}") from error
    routed = Routed(model, config)
    try:
        routed.load_state_dict(state)
    except UserError:
        routed.remove()
        raise
    return routed


def _chosen(host: Host, config: RoutedConfig) -> tuple[Block, ...]:
    if config.layers is None:
        return host.blocks
    for n in config.layers:
        if not 0 <= n < len(host.blocks):
            raise UserError(f"layers must be from 0 to {len(host.blocks) - 1}, got {n}")
    return tuple(host.blocks[n] for n in sorted(set(config.layers)))


def _lora_plan(blocks: tuple[Block, ...], config: RoutedLoRAConfig):
    """context -> (module, name of its child, child) of every branch, in the order of layers and sites."""
    wanted: list[tuple[Site, str]] = []
    for block in blocks:
        for name in config.sites:
            if name not in block.sites:
                raise UserError(f"the host has no site {name}: it has {', '.join(block.sites)}")
            part = name.rpartition(".")[2]
            if config.couple_qv and name == "self.v":
                continue
            coupled = config.couple_qv and name == "self.q" and block.sites[name].part is not None
            if config.couple_qv and name == "self.q" and not coupled:
                raise UserError("couple_qv needs a host whose q and v are one projection")
            wanted.append((block.sites[name], "qv" if coupled else part))
    for site, _ in wanted:
        if site.kind == "packed":
            routed_class(site.module)

    def made(context: VisualContext):
        for site, parts in wanted:
            out, inside = _shape(site)
            yield site.module, PREFIX + parts, LowRank(inside, out, config, context, len(parts) if site.part else 1)

    return made


def _adapter_plan(blocks: tuple[Block, ...], config: RoutedAdapterConfig):
    def made(context: VisualContext):
        for block in blocks:
            shared = None
            for module in block.adapters:
                if shared is None or not config.share:
                    shared = Adapter(context.width, config, context)
                yield module, PREFIX + "adapter", shared

    return made


def _shape(site: Site) -> tuple[int, int]:
    """(out, in) of one part."""
    if site.kind == "packed":
        out, inside = site.module.in_proj_weight.shape
        return out // 3, inside
    # Hugging Face's Conv1D has its weight the other way round.
    out, inside = site.module.weight.shape if isinstance(site.module, nn.Linear) else site.module.weight.shape[::-1]
    return (out // 3 if site.part else out), inside


def _add(name: str):
    """A hook that adds one branch to a Linear's output, or to its parts of a fused one."""
    parts = name.removeprefix(PREFIX)

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        branch = getattr(module, name)
        delta = branch(args[0])
        if delta.shape[-1] == output.shape[-1]:
            return output + delta
        thirds = list(output.chunk(3, -1))
        for part, piece in zip(parts, delta.chunk(len(parts), -1)):
            thirds["qkv".index(part)] = thirds["qkv".index(part)] + piece
        return torch.cat(thirds, -1)

    return hook


def _adapt(name: str):
    def hook(module: nn.Module, args: tuple, output):
        first = output[0] if isinstance(output, tuple) else output
        adapted = getattr(module, name)(first)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    return hook
