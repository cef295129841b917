"""Regularized mask tuning in plain PyTorch. This file is the whole method.

Every C++, CUDA and Triton kernel is tested against it, and it runs wherever no faster kernel does. It is written to be
read: no tiling, no tricks.

    bits     = packed(scores > threshold)                                    pack_scores
    y        = x @ (weight * bits).T + bias                                  masked_linear
    dx       = g @ (weight * bits)                                           masked_linear_dx
    d_weight = g.T @ x                                                       weight_grad_
    g_task   = (softmax(z) - onehot(label)) / B                              logit_cotangents
    g_general = T * (softmax(z / T) - softmax(teacher / T)) / B              logit_cotangents
    a        = (g_task.T @ x) * weight + penalty * scores                    mask_grad  (straight-through)
    b        = (g_general.T @ x) * weight                                    mask_grad
    P        = (1 + sign(a) * (a + b) / (|a| + |b| + eps)) / 2               keep_probability
    grad     = a where P > U, else (1 - strength) * a                        gradient_dropout
    scores  -= Adam(grad);  bits = packed(scores > threshold)                mask_update_, all of it from a and b on

Shapes, everywhere in this package: B images, M = B * tokens rows, K in_features, N out_features, C classes, T tasks.
    z, teacher (B, C)   x (M, K)   weight, scores (N, K)   bits (N, ceil(K / 32)) int32   g, g_task, g_general (M, N)
    rng (2,) int64 = [seed, step], on the tensors' device, so that a captured CUDA graph can change it between replays

Source: Zheng et al., Regularized Mask Tuning, ICCV 2023, arXiv:2307.15049; constants from github.com/wuw2019/R-AMT.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# R-AMT's constant, added after the chain rule through W. Not a mere guard: mask gradients near 1e-8 are pulled
# towards P = 1/2 by it, which is why gradients must never be loss-scaled here.
GDR_EPS = 1e-8
LOW32 = 0xFFFFFFFF
# Added to a layer's stream for the draw that rounds its moments: the lower 16 bits exp_avg's, the upper exp_avg_sq's.
ROUNDING_STREAM = 2**31
# Flat elements that share an exponent where moments are stored in 8 bits.
MOMENT_BLOCK = 256


def pack_bits(mask: Tensor) -> Tensor:
    """(N, K) bool -> (N, ceil(K / 32)) int32. Column k is bit k % 32 of word k // 32; pad bits are 0."""
    planes = F.pad(mask.to(torch.int64), (0, -mask.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (planes << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 32)) int32 -> (N, K) bool. Inverse of `pack_bits`."""
    planes = bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device) & 1
    return planes.flatten(1)[:, :in_features].bool()


def pack_scores(scores: Tensor, threshold: float) -> Tensor:
    """(N, K) -> bits of `scores > threshold`: strict, so a score equal to the threshold is off; compared in fp32."""
    return pack_bits(_accurate(scores) > threshold)


def masked_weight(weight: Tensor, bits: Tensor) -> Tensor:
    """(N, K) weight with the off elements set to +0. Exact in any dtype; an off inf or NaN gives 0."""
    return torch.where(unpack_bits(bits, weight.shape[1]), weight, 0)


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    """(..., K) -> (..., N), in x's dtype. `dense` is `masked_weight(weight, bits)` where the caller keeps it."""
    dense = masked_weight(weight, bits) if dense is None else dense
    return linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as it runs while the weight requires a gradient, whether it does or not.

    For a batch of transposed rows `F.linear` rounds differently once the weight is frozen: it then skips the fold into
    one product. Folding keeps a masked model equal to the unmodified one.
    """
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y.add_(bias)


def masked_linear_dx(g: Tensor, weight: Tensor, bits: Tensor, dense: Tensor | None) -> Tensor:
    """(..., N) -> (..., K). Cotangent of x."""
    return g @ (masked_weight(weight, bits) if dense is None else dense).to(g.dtype)


def masked_weight_(out: Tensor, weight: Tensor, bits: Tensor, old: Tensor | None) -> None:
    """out = masked_weight(weight, bits). old: the bits that `out` holds now; only words that differ are written."""
    if old is None:
        out.copy_(masked_weight(weight, bits))
    else:
        changed = unpack_bits(bits ^ old, weight.shape[1])
        out.copy_(torch.where(changed, masked_weight(weight, bits), out))


def grouped_masked_linear(
    x: Tensor, weight: Tensor, bits: list[Tensor | None], bias: Tensor | None, offsets: list[int], invariant: bool
) -> Tensor:
    """(M, K) -> (M, N). Rows offsets[g] .. offsets[g + 1] use bits[g] (N, ceil(K / 32)), or all of weight where None.

    invariant: a row's result depends on that row and its mask alone, whatever else is in the batch: here each row is a
    product of its own.
    """
    y = x.new_empty((len(x), len(weight)))
    for words, i, j in zip(bits, offsets, offsets[1:]):
        dense = weight if words is None else masked_weight(weight, words)
        for first in range(i, j) if invariant else (i,):
            rows = slice(first, first + 1 if invariant else j)
            y[rows] = linear(x[rows], dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y


def logit_cotangents(logits: Tensor, teacher: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, C) logits of the masked and of the frozen model, (B,) labels -> g_task, g_general, both (B, C).

    They are d/dz of mean cross entropy and of T^2 * mean KL(teacher || student), R-AMT's two losses.
    """
    z, t = _accurate(logits), _accurate(teacher)
    g_task = z.softmax(-1) - F.one_hot(label, z.shape[1])
    g_general = ((z / temperature).softmax(-1) - (t / temperature).softmax(-1)) * temperature
    return g_task / len(z), g_general / len(z)


def keep_probability(a: Tensor, b: Tensor) -> Tensor:
    """P: 1 where the signs agree, 1/2 where a = 0, towards 0 where b opposes and outweighs a."""
    return (1 + a.sign() * (a + b) / (a.abs() + b.abs() + GDR_EPS)) / 2


def gradient_dropout(
    grad_task: Tensor, grad_general: Tensor | None, weight: Tensor | None, scores: Tensor | None,
    penalty: Tensor | None, rng: Tensor | None, strength: float, stream: int,
) -> Tensor:  # fmt: skip
    """Gradient of the scores from the two weight gradients g.T @ x, with gradient dropout. Returns (N, K), fp32.

    weight None: the two are gradients of the scores already. grad_general None: no dropout, only the chain rule and
    the L2 term. penalty (): coefficient / norm(scores), the L2 term's factor, a tensor so that no step waits for the
    device. strength: R-AMT's lambda; 1 zeroes a dropped element, 0 switches dropout off. stream: number of the layer.
    """
    return _score_gradient(grad_task, grad_general, weight, scores, penalty, rng, strength, stream, 0)


def _score_gradient(
    grad_task: Tensor, grad_general: Tensor | None, weight: Tensor | None, scores: Tensor | None,
    penalty: Tensor | None, rng: Tensor | None, strength: float, stream: int, offset: int,
) -> Tensor:  # fmt: skip
    """`gradient_dropout` of some rows of a layer: `offset` is the flat index of their first element within it."""
    a, b = _accurate(grad_task), None if grad_general is None else _accurate(grad_general)
    a, b = (a, b) if weight is None else (a * weight, None if b is None else b * weight)
    a = a if penalty is None else a + penalty * scores
    if b is None:
        return a
    kept = keep_probability(a, b) > philox_uniform(rng, stream, a.shape, offset)
    return torch.where(kept, a, (1 - strength) * a)


def weight_grad_(out: Tensor, g: Tensor, x: Tensor, accumulate: bool) -> None:
    """out (N, K) = g.T @ x from rows g (M, N) and x (M, K), or += where `accumulate`.

    Factors, sums and result in out's dtype: 16-bit factors are widened, which is exact, and nothing is rounded back. In
    one dtype this is autograd's own gradient of `F.linear`'s weight, bit for bit.
    """
    g, x = g.to(out.dtype).T, x.to(out.dtype)
    if accumulate:
        torch.addmm(out, g, x, out=out)
    else:
        torch.mm(g, x, out=out)


def mask_grad(
    x: Tensor, g_task: Tensor, g_general: Tensor | None, weight: Tensor, scores: Tensor | None,
    penalty: Tensor | None, rng: Tensor | None, strength: float, stream: int,
) -> Tensor:  # fmt: skip
    """`gradient_dropout` of the two weight gradients, from the layer's input (M, K) and output cotangents (M, N)."""
    x = _accurate(x)
    grads = [None if g is None else _accurate(g).T @ x for g in (g_task, g_general)]
    return gradient_dropout(*grads, weight, scores, penalty, rng, strength, stream)


def adam_factors(step: Tensor, lr: float | Tensor, beta1: float, beta2: float) -> Tensor:
    """(2,) fp32: Adam's step size lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), on the device of `step` (), t >= 1."""
    t = step.double()
    return torch.stack([lr / (1 - beta1**t), (1 - beta2**t).rsqrt()]).float()


def mask_update_(
    scores: list[Tensor], bits: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], dense: list[Tensor],
    grads: list[Tensor], weights: list[Tensor], factors: Tensor, beta1: float, beta2: float, eps: float,
    threshold: float, generals: list[Tensor] = (), chained: list[bool] = (), scales: list[Tensor] = (),
    norms: Tensor | None = None, counts: Tensor | None = None, rng: Tensor | None = None, l2: float = 0.0,
    strength: float = 1.0, streams: list[int] = (), offsets: list[int] = (),
) -> None:  # fmt: skip
    """One Adam step for every layer from `gradient_dropout`'s gradient, then all that follows from the new scores.

    Writes scores and moments, bits, the masked weight where `dense` is not empty, norms (L,) of the new scores and
    counts (L, 2): bits flipped, bits on. A gradient goes through `weights` where `chained` says so. l2 / norms[i], of
    the scores before, is the L2 term's penalty. Moments: fp32, or stored by `store_moment`, scales then being exp_avg's
    and exp_avg_sq's for each layer in turn. offsets: where a layer given is some rows of a whole one, the flat index of
    its first element in that, whose draws it takes.
    """
    for i, s in enumerate(scores):
        stream, offset = streams[i] if streams else i, offsets[i] if offsets else 0
        general, weight = generals[i] if generals else None, weights[i] if chained and chained[i] else None
        # The subgradient at 0 is 0, as torch.norm's: the clamp keeps 0 / 0 out.
        penalty = l2 / norms[i].clamp_min(torch.finfo(torch.float32).tiny) if l2 else None
        g = _score_gradient(grads[i], general, weight, s, penalty, rng, strength, stream, offset)
        stored, exponents = (exp_avgs[i], exp_avg_sqs[i]), scales[2 * i : 2 * i + 2] or (None, None)
        m, v = (load_moment(x, e, signed) for x, e, signed in zip(stored, exponents, (True, False)))
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        s.sub_(m * factors[0] / (v.sqrt() * factors[1] + eps))
        if stored[0].dtype in (torch.bfloat16, torch.uint8):
            random = philox_words(rng, stream + ROUNDING_STREAM, s.shape, offset)
            store_moment(m, random & 0xFFFF, stored[0], exponents[0], True)
            store_moment(v, random >> 16, stored[1], exponents[1], False)
        before = unpack_bits(bits[i], s.shape[1])
        bits[i].copy_(pack_scores(s, threshold))
        if dense:
            dense[i].copy_(masked_weight(weights[i], bits[i]))
        if norms is not None:
            norms[i] = s.double().norm()
        if counts is not None:
            now = unpack_bits(bits[i], s.shape[1])
            counts[i] = torch.stack([(before != now).sum(), now.sum()])


def load_moment(stored: Tensor, exponents: Tensor | None, signed: bool) -> Tensor:
    """A moment of Adam in fp32: `stored` itself where it is fp32 (or fp64), its value where it is bf16 or uint8.

    uint8: minifloats of 3 mantissa bits, 4 exponent bits and a sign (signed: exp_avg) or 5 exponent bits (exp_avg_sq),
    relative to `exponents` (ceil(numel / 256),) uint8, a biased fp32 exponent E for each 256 flat elements. Magnitude c
    is the fp32 pattern (E - 15 or 31 << 23) + (c << 20); c = 0 is 0; E = 255 is NaN, whatever c.
    """
    if stored.dtype != torch.uint8:
        return stored.float() if stored.dtype == torch.bfloat16 else stored
    codes, e = stored.flatten().int(), exponents.int().repeat_interleave(MOMENT_BLOCK)[: stored.numel()]
    c = codes & 127 if signed else codes
    x = torch.where(c == 0, 0.0, ((e - (15 if signed else 31) << 23) + (c << 20)).view(torch.float32))
    x = torch.where(e == 255, torch.nan, torch.where(codes > 127, -x, x) if signed else x)
    return x.view(stored.shape)


def store_moment(x: Tensor, random: Tensor, stored: Tensor, exponents: Tensor | None, signed: bool) -> None:
    """Writes fp32 `x` (N, K) into `stored`, bf16 or uint8 with its `exponents`, as `load_moment` reads them.

    Rounded stochastically, to x on average: nearest rounding would undo every change of less than half a step, and
    exp_avg_sq changes by a thousandth. random: 16 bits each. Added below the kept bits of the pattern, they carry in
    proportion to what is cut off. uint8: E is that of the block's largest element, and one more where rounding it up
    would carry. An exp_avg below the smallest magnitude becomes that or 0; an exp_avg_sq is raised to it, unless it is
    0: it is a denominator, and 0 for it would make a step of exp_avg / eps.
    """
    pattern = x.flatten().view(torch.int32)
    random = random.flatten().int()
    if stored.dtype == torch.bfloat16:
        pattern = pattern + torch.where(x.flatten().isfinite(), random, 0) >> 16
        return stored.copy_(pattern.to(torch.int16).view(torch.bfloat16).view(x.shape))
    size, magnitude = x.flatten().abs(), pattern & 0x7FFFFFFF
    blocks = F.pad(magnitude, (0, -x.numel() % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)
    span = 15 if signed else 31
    # From span + 1 on every code is a normal number.
    e = (blocks.amax(1).long() + 0xFFFFF >> 23).clamp(span + 1, 255).int()
    exponents.copy_(e)
    base = (e - span << 23).repeat_interleave(MOMENT_BLOCK)[: x.numel()]
    smallest = (base + (1 << 20)).view(torch.float32)
    small = (random + 0.5) * (smallest * 2.0**-16) < size if signed else size > 0
    # 16 bits at the top of the 20 cut off, and half of the last of them: the chance is rounded, not cut.
    c = (magnitude - base + (random << 4) + 8 >> 20).clamp(max=127 if signed else 255)
    c = torch.where(magnitude - base < 1 << 20, small.int(), c)
    stored.copy_((torch.where(x.flatten() < 0, c + 128, c) if signed else c).view(x.shape))


def philox_uniform(rng: Tensor, stream: int, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Uniforms in [0, 1), fp32, a function of (seed, step, stream, flat index) alone: the upper 24 of 32 bits.

    offset: flat index of the first element.
    """
    return (philox_words(rng, stream, shape, offset) >> 8).float() * 2.0**-24


def philox_words(rng: Tensor, stream: int, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """32 random bits each, int64: Philox-4x32-10.

    Key (seed low, seed high + stream), counter (index // 4 as 64 bits, step as 64 bits), word index % 4, where index
    counts from `offset` on.
    """
    numel = torch.Size(shape).numel()
    group = torch.arange(offset // 4, -(-(offset + numel) // 4), device=rng.device)
    seed, step = rng.unbind()
    c0, c1, c2, c3 = group & LOW32, group >> 32, step & LOW32, step >> 32 & LOW32
    k0, k1 = seed & LOW32, (seed >> 32) + stream & LOW32
    for _ in range(10):
        (h0, l0), (h2, l2) = _mul32(c0, 0xD2511F53), _mul32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9 & LOW32, k1 + 0xBB67AE85 & LOW32
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1).flatten()
    return words[offset % 4 :][:numel].reshape(shape)


def _mul32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for a, b < 2**32, without overflowing int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _accurate(x: Tensor) -> Tensor:
    """fp32, or fp64 where the caller works in fp64."""
    return x if x.dtype == torch.float64 else x.float()
