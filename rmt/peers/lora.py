"""CLIP-LoRA: low-rank branches beside q, k and v in every attention block of both towers.

Not through peft, whose `MultiheadAttention` (0.21, lora/layer.py) cannot be this recipe: one lora_A for q, k and v
together, out_proj adapted too with no way to leave it, and B A written into the weight around every call, where dropout
has no x to drop numbers of. The branches equal those of its `Linear`, which a test holds to 1e-12.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import PackedAttention
from ..config import UserError
from ..masking import PATTERNS
from ..modules import turned_into
from .footing import Footing, class_vectors
from .method import Fit, Method, State, cosine_logits
from .parts import need_for_model
from .train import cosine_rates, count, train

RANK, ALPHA, DROPOUT = 2, 1, 0.25
SCALE = ALPHA / math.sqrt(RANK)
LR, LAST_LR, DECAY = 2e-4, 1e-6, 1e-2
STEPS_A_SHOT = 500
_KEYS = ("lora_A", "lora_B")


class LoraAttention(PackedAttention):
    """A frozen `nn.MultiheadAttention` with q, k, v = W x + b + SCALE * B A dropout(x), A and B of each its own.

    lora_A (3, RANK, E): kaiming_uniform(a=sqrt(5)), drawn on the CPU. lora_B (3, E, RANK): zeros, so that a new layer
    is the plain one. q, k and v each drop other numbers of x, and in training mode alone.
    """

    @classmethod
    def over(cls, attn: nn.MultiheadAttention) -> "LoraAttention":
        """Shares `attn`'s tensors."""
        layer, weight = turned_into(attn, cls), attn.in_proj_weight
        a = torch.empty(3, RANK, attn.embed_dim)
        for one in a:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))
        layer.lora_A = nn.Parameter(a.to(weight))
        layer.lora_B = nn.Parameter(weight.new_zeros(3, attn.embed_dim, RANK))
        # Training mode is for the branches: the attention itself drops nothing, as in CLIP-LoRA.
        layer.dropout = 0.0
        return layer

    def _linear(self, x: Tensor, prefix: str, bias: Tensor | None) -> Tensor:
        rows = F.dropout(x.reshape(1, -1, x.shape[-1]).expand(3, -1, -1), DROPOUT, self.training)
        branches = rows @ self.lora_A.mT * SCALE @ self.lora_B.mT
        return F.linear(x, self.in_proj_weight, bias) + branches.transpose(0, 1).reshape(*x.shape[:-1], -1)

    def _masked_weight(self, prefix: str) -> Tensor:
        raise UserError("lora runs self-attention without returned weights or padding: leave it out for this model")


class LoRA(Method):
    """CLIP-LoRA's recipe; the class vectors are computed anew in every step, since the text tower trains too."""

    name, title, kind = "lora", "CLIP-LoRA", "image"
    source = (
        "Zanella and Ben Ayed, CVPR workshops 2024; MaxZanella/CLIP-LoRA at 358f0d7 (lora.py, loralib, run_utils.py); "
        "template and crops of the comparison, fp32 or bf16 in place of fp16"
    )

    def fit(self, footing: Footing, state: State) -> Fit:
        """Raises UserError for a model without plain attention blocks in both towers."""
        model = footing.copy(state)
        found = attentions(model)
        shots = footing.config.shots
        if shots == "all":
            shots = math.ceil(len(footing.split.train) / footing.classes)
        published = STEPS_A_SHOT * shots
        steps, lr = footing.steps(published), footing.rate(self.name, LR)
        with torch.random.fork_rng([footing.device] if footing.device.type == "cuda" else []):
            torch.manual_seed(footing.config.seed)
            layers = {name: LoraAttention.over(attn) for name, attn in found.items()}
            for name, layer in layers.items():
                model.set_submodule(name, layer.train())
            values = [getattr(layer, key) for layer in layers.values() for key in _KEYS]
            optimizer = torch.optim.AdamW(values, lr=lr, betas=(0.9, 0.999), weight_decay=DECAY)

            def text() -> Tensor:
                return F.normalize(model.encode_text(footing.text.tokens).float(), dim=-1)

            train(footing, model, optimizer, cosine_rates(lr, steps, floor=LAST_LR), text, self.title)
        stored = {f"{name}.{key}": getattr(layer, key).detach() for name, layer in layers.items() for key in _KEYS}
        chosen = {"lr": lr, "rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "weight_decay": DECAY}
        return Fit(stored, count(values), chosen, steps, published)

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """A plain model: SCALE * B A is added into a copy's in-projections."""
        model = footing.copy(state)
        weights = {name: attn.in_proj_weight for name, attn in attentions(model).items()}
        shapes = {f"{name}.lora_A": torch.Size((3, RANK, w.shape[1])) for name, w in weights.items()}
        shapes |= {f"{name}.lora_B": torch.Size((3, w.shape[1], RANK)) for name, w in weights.items()}
        need_for_model(self.name, stored, shapes)
        with torch.no_grad():
            for name, weight in weights.items():
                a, b = (stored[f"{name}.{key}"].to(weight) for key in _KEYS)
                weight.add_((SCALE * b @ a).flatten(0, 1))
        text = class_vectors(footing, model)
        return State(model, (*state.stack, self.name), text, cosine_logits(model, text))


def attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """The attention blocks of both towers by name. Raises UserError where one is missing, or not torch's own."""
    found: dict[str, nn.MultiheadAttention] = {}
    remedy = "lora needs a ViT of open_clip 3.3 or older, with its own text tower: take one, or leave lora out"
    for tower in ("ViT image tower", "text tower"):
        wanted = PATTERNS[tower]["attention"]
        mine = {name: module for name, module in model.named_modules() if wanted.fullmatch(name)}
        if not mine:
            raise UserError(f"the model has no attention blocks of a {tower}; {remedy}")
        for name, attn in mine.items():
            # A forward of its own reads one weight for all tokens, and no branch can drop numbers of a token there.
            if type(attn).forward is not nn.MultiheadAttention.forward or attn.in_proj_weight is None:
                raise UserError(f"{name} must be nn.MultiheadAttention, got {type(attn).__name__}; {remedy}")
        found |= mine
    return found
