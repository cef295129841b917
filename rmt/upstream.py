"""The demo's own small CLIP, trained from nothing on the pictures of `rmt.pictures`.

Training has two stages with one loss, CLIP's symmetric contrastive one. First the text tower alone learns to tell the
concepts apart, caption against caption, in seconds; then it is locked and the image tower learns against its features.
From nothing and in a minute the two cannot learn together: at the start all captions have nearly one feature, and
neither tower gets a gradient that tells a 3 from a k. Pictures of one concept are all positives of its captions, for a
batch holds a concept more than once (UniCL, arXiv:2204.03610, equation 3).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import write_json, write_whole
from .pictures import SIZE, bank, render

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIZE, "patch_size": 4, "width": 96, "layers": 2, "head_width": 32, "pool_type": "avg"},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
PREPROCESS = {
    "mean": [0.5] * 3, "std": [0.25] * 3, "size": [SIZE, SIZE], "mode": "RGB",
    "interpolation": "bicubic", "resize_mode": "squash",
}  # fmt: skip


def contrastive_loss(image: Tensor, text: Tensor, concept: Tensor, scale: Tensor) -> Tensor:
    """image, text: (B, D) L2-normalised; concept: (B,). Cross entropy both ways, same concepts sharing the target."""
    same = (concept[:, None] == concept).float()
    target = same / same.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread: a second one gains a small model little, and costs fourfold on a busy machine.

    The result is then the same on any number of cores as well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(
    steps: int, seed: int, batch: int = 64, lr: float = 3e-3, progress: Callable[[int, float], None] | None = None
) -> nn.Module:
    """A model of MODEL's shape, its image tower trained for `steps` steps; `progress` gets (step, loss) after each.

    Warm-up for a tenth of the steps, then linearly to zero. On the CPU.
    """
    import open_clip

    # The generator's state is put back: nothing that the caller draws later depends on this training.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**MODEL)
    texts = {text: number for number, text in enumerate(t for c in bank()[1] for t in c.captions)}
    features = _train_text(model, seed, list(texts))
    mean, std = (torch.tensor(PREPROCESS[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    optimizer = torch.optim.AdamW([*model.visual.parameters(), model.logit_scale], betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
        scene = render(seed, step, batch)
        image = model.encode_image((scene.image - mean) / std, normalize=True)
        text = features[[texts[caption] for caption in scene.captions]]
        loss = contrastive_loss(image, text, scene.concept, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
    return model.eval()


def _train_text(model: nn.Module, seed: int, texts: list[str], steps: int = 150, lr: float = 3e-3) -> Tensor:
    """Trains the text tower; two captions drawn of each concept attract. Returns the features of `texts`, (n, D)."""
    import open_clip

    tokens = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(texts)
    counts = torch.tensor([len(c.captions) for c in bank()[1]])
    first, concept = counts.cumsum(0) - counts, torch.arange(len(counts))
    random = torch.Generator().manual_seed(seed)
    table = model.token_embedding
    # All captions together have 100 of the 49,408 rows: dense, their update would cost more than all the rest.
    table.sparse = True
    own = [
        p for name, p in model.named_parameters() if p is not table.weight and not name.startswith(("visual", "logit"))
    ]
    optimizers = torch.optim.AdamW(own, lr=lr, weight_decay=0), torch.optim.SparseAdam([table.weight], lr=lr)
    scale = model.logit_scale.detach().exp()
    for _ in range(steps):
        pick = first + (torch.rand(2, len(counts), generator=random) * counts).long()
        one, other = model.encode_text(tokens[pick.flatten()], normalize=True).chunk(2)
        loss = contrastive_loss(one, other, concept, scale)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        return model.encode_text(tokens, normalize=True)


def save(model: nn.Module, folder: Path) -> str:
    """Writes `folder` as an open_clip local-dir; returns the name to load it by."""
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "open_clip_model.safetensors", to_bytes(model.state_dict()))
    write_json(folder / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    return f"local-dir:{folder}"
