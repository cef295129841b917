"""CoCoOp: context vectors that a small net shifts for every image, so that each image has class vectors of its own.

Zhou et al., CVPR 2022 (arXiv 2203.05557). Recipe: KaiyangZhou/CoOp, trainers/cocoop.py and
configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from .context import Context, encode
from .coop import LR, MOMENTUM, PHOTO, WEIGHT_DECAY, low, notes, tune
from .footing import Footing
from .heads import WARMUP_LR, dassl_rates
from .method import Fit, Method, State
from .train import count

N_CTX, EPOCHS, BATCH = 4, 10, 1
# Texts in one pass of the text tower, of which an image needs one a class: 0.8 GB of activations in that of ViT-B/16.
TEXTS = 512


class Conditional(nn.Module):
    """vectors + up(relu(down(f))), f the image feature of length 1: D -> max(1, D // 16) -> W.

    seed: of the linear layers' start, torch's own: uniform up to 1 / sqrt(inputs), biases too.
    """

    def __init__(self, context: Context, size: int, seed: int) -> None:
        super().__init__()
        self.context = context
        hidden, width = max(1, size // 16), context.vectors.shape[-1]
        # nn.Linear itself would draw from the global generator.
        self.down = nn.utils.skip_init(nn.Linear, size, hidden, device=context.vectors.device)
        self.up = nn.utils.skip_init(nn.Linear, hidden, width, device=context.vectors.device)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.down, self.up):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))

    def logits(self, features: Tensor, low: bool = False) -> Tensor:
        """(B, D) features, not normalised -> (B, C) fp32. low: the text tower runs under autocast to bf16.

        B * C texts, in passes of at most TEXTS.
        """
        model, tokens = self.context.model, self.context.tokens
        features = F.normalize(features.float(), dim=-1)
        vectors = self.context.vectors + self.up(self.down(features).relu())[:, None]
        pairs, cosines = torch.arange(len(features) * len(tokens), device=tokens.device), []
        for pair in pairs.split(TEXTS):
            image, label = pair // len(tokens), pair % len(tokens)
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=low):
                text = encode(model, tokens[label], vectors[image])
            cosines.append((features[image] * text).sum(-1))
        return model.logit_scale.detach().exp() * torch.cat(cosines).view(len(features), len(tokens))

    def stored(self) -> dict[str, Tensor]:
        """Context and net, fp32."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def load(self, stored: dict[str, Tensor]) -> None:
        """Takes what `stored` gave. Raises UserError for other names or shapes."""
        want, got = ({k: tuple(v.shape) for k, v in d.items()} for d in (self.state_dict(), stored))
        if got != want:
            raise UserError(f"what CoCoOp stored must have the shapes {want}, got {got}: fit it again")
        self.load_state_dict(stored)


class CoCoOp(Method):
    """Four vectors that start as "a photo of a", and the net that shifts them.

    The state's class vectors, which other methods read, are those of the vectors that no image shifts.
    """

    name, title, kind = "cocoop", "CoCoOp", "text"
    source = (
        "Zhou et al., CVPR 2022; KaiyangZhou/CoOp, trainers/cocoop.py, "
        "configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml"
    )

    def _module(self, footing: Footing, state: State) -> Conditional:
        seed, names = footing.config.seed, footing.split.classnames
        context = Context(
            state.model, footing.loaded.tokenizer, names, n_ctx=N_CTX, init=PHOTO, class_specific=False, seed=seed
        )
        return Conditional(context, state.text.shape[1], seed)

    def fit(self, footing: Footing, state: State) -> Fit:
        """Trains on the state's augmented features, one image a step."""
        module, images = self._module(footing, state), len(footing.split.train)
        lr, published = footing.rate(self.name, LR), EPOCHS * images
        rates = dassl_rates(lr, footing.feature_steps(published), EPOCHS)
        parameters = list(module.parameters())
        tune(footing, state, self.title, parameters, rates, BATCH, lambda x: module.logits(x, low(footing)))
        chosen = {
            "lr": lr, "epochs": EPOCHS, "batch": BATCH, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY,
            "warmup_lr": WARMUP_LR, "n_ctx": N_CTX, "init": PHOTO, "hidden": module.down.out_features,
        }  # fmt: skip
        return Fit(module.stored(), count(parameters), chosen, len(rates), published, notes=notes(footing))

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """Class vectors that depend on the image: a text pass over all classes for every image."""
        module = self._module(footing, state)
        module.load(stored)
        module.requires_grad_(False)
        with torch.no_grad():
            text = module.context.text()
        return State(state.model, state.stack, text, torch.no_grad()(module.logits))
