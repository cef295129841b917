"""The mask codec: size against entropy, time against zlib: python bench/codec.py [TASK ...] [--quick] [--json FILE]

Random masks of a ViT-B/16 image tower's attention and patch weights (28,901,376 bits in 25 tensors) at several rates,
and the masks of the task files given. Sizes are of all tensors together, headers included, over the sum of each
tensor's zero-order entropy; `worst` is the largest tensor's bytes less 200, over its entropy. Rivals: plain bits
(`numpy.packbits`), those through zlib, and one byte a gap (255 for a longer one's part) through zlib. Decoded masks are
compared before anything is timed.
"""

import argparse
import zlib
from collections.abc import Callable

import harness
import numpy as np
import torch
from torch import Tensor

import rmt_kernels as rk
from rmt_kernels.backends import native

VIT_B16 = [(768, 768), *12 * [(2304, 768), (768, 768)]]
OFF = (0.001, 0.005, 0.01, 0.0256, 0.05, 0.1, 0.2, 0.3, 0.382, 0.4, 0.5, 0.7, 0.9, 0.99)
TABLE = ("rmt", "plain", "bits", "bits + zlib", "gaps + zlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="task folder or file of real masks")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="three rates, three tensors")
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    args = parser.parse_args()
    base = harness.provenance(torch.device("cpu")) | {"bench": "codec", "native": native.extension is not None}
    shapes, rates = (VIT_B16[:3], (0.0256, 0.2, 0.5)) if args.quick else (VIT_B16, OFF)
    cases: list[tuple[str, Callable[[], list]]] = [
        (f"random, {100 * off:g} % off", lambda off=off: random_masks(shapes, off)) for off in rates
    ]
    cases += [(path, lambda path=path: task_masks(path)) for path in args.tasks]
    rows = []
    with harness.progress(len(cases), "timing") as bar:
        for name, make in cases:
            rows.append(base | {"masks": name} | measure(make(), args.seconds))
            bar.update()
    print(f"{base['device_name']}, torch {base['torch']}, {'C++' if base['native'] else 'no C++'}")
    harness.print_table(
        ["masks", "off %", "rmt bytes", "/ entropy", "worst", *(f"{n}/rmt" for n in TABLE[2:]),
         *(f"{n} {way} ms" for way in ("encode", "decode") for n in TABLE)],
        [[r["masks"][-40:], f"{100 * r['off'] / r['weights']:.2f}", f"{r['bytes']['rmt']:,}", ratio(r["over_entropy"]),
          ratio(r["worst_less_200"])]
         + [f"{r['bytes'][n] / r['bytes']['rmt']:.2f}" for n in TABLE[2:]]
         + [f"{r[way][n]['median']:.1f}" for way in ("encode_ms", "decode_ms") for n in TABLE] for r in rows],
    )  # fmt: skip
    if args.json:
        harness.write_json(args.json, rows)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def random_masks(shapes: list[tuple[int, int]], off: float) -> list[tuple[Tensor, int]]:
    """(bits, K) of each shape."""
    generator = np.random.default_rng(0)
    return [(rk.pack_bits(torch.from_numpy(generator.random(shape, np.float32) >= off)), shape[1]) for shape in shapes]


def task_masks(path: str) -> list[tuple[Tensor, int]]:
    from rmt.checkpoint import load_task

    task = load_task(path)
    return [(task.bits[key], k) for key, (_, k) in task.shapes.items()]


def plainly(call: Callable, *args: object) -> object:
    """Without the extension."""
    before, native.extension = native.extension, None
    try:
        return call(*args)
    finally:
        native.extension = before


def flat(bits: Tensor, k: int) -> np.ndarray:
    return np.unpackbits(bits.numpy().view(np.uint8), axis=1, bitorder="little")[:, :k].ravel()


def packed(mask: np.ndarray, n: int, k: int) -> Tensor:
    return rk.pack_bits(torch.from_numpy(mask.reshape(n, k).view(bool)))


def unpacked(data: bytes, n: int, k: int) -> Tensor:
    return packed(np.unpackbits(np.frombuffer(data, np.uint8), count=n * k), n, k)


def encode_gaps(bits: Tensor, k: int) -> bytes:
    """Gaps between the rarer bits, a byte each: 255 says that 255 more bits go by."""
    mask = flat(bits, k)
    on = 2 * int(mask.sum()) < mask.size
    gaps = np.diff(np.flatnonzero(mask == on), prepend=-1) - 1
    long = gaps // 255
    out = np.full(gaps.size + int(long.sum()), 255, np.uint8)
    out[np.cumsum(long + 1) - 1] = gaps % 255
    return bytes([on]) + zlib.compress(out.tobytes())


def decode_gaps(data: bytes, n: int, k: int) -> Tensor:
    steps = np.frombuffer(zlib.decompress(data[1:]), np.uint8)
    ends = steps != 255
    mask = np.full(n * k, 1 - data[0], np.uint8)
    mask[(np.cumsum(steps.astype(np.int64) + ends) - 1)[ends]] = data[0]
    return packed(mask, n, k)


ENCODE = {
    "rmt": rk.encode_bits,
    "plain": lambda bits, k: plainly(rk.encode_bits, bits, k),
    "bits": lambda bits, k: np.packbits(flat(bits, k)).tobytes(),
    "bits + zlib": lambda bits, k: zlib.compress(np.packbits(flat(bits, k)).tobytes()),
    "gaps + zlib": encode_gaps,
}
DECODE = {
    "rmt": lambda data, n, k: rk.decode_bits(data)[0],
    "plain": lambda data, n, k: plainly(rk.decode_bits, data)[0],
    "bits": unpacked,
    "bits + zlib": lambda data, n, k: unpacked(zlib.decompress(data), n, k),
    "gaps + zlib": decode_gaps,
}


def measure(masks: list[tuple[Tensor, int]], seconds: float) -> dict:
    """Checks that all come back as they were, then times all tensors together, encoding and decoding apart."""
    shapes = [(bits.shape[0], k) for bits, k in masks]
    coded = {name: [encode(bits, k) for bits, k in masks] for name, encode in ENCODE.items()}
    for name, decode in DECODE.items():
        for data, (bits, k) in zip(coded[name], masks):
            if not torch.equal(decode(data, bits.shape[0], k), bits):
                raise SystemExit(f"{name}: a mask of {tuple(bits.shape)} words did not come back")
    if coded["rmt"] != coded["plain"]:
        raise SystemExit("C++ and plain Python encode differently")
    off = [n * k - int(flat(bits, k).sum()) for (bits, _), (n, k) in zip(masks, shapes)]
    entropies = [entropy_bytes(count, n * k) for count, (n, k) in zip(off, shapes)]
    encoders = {name: lambda f=f: [f(bits, k) for bits, k in masks] for name, f in ENCODE.items()}
    decoders = {
        name: lambda f=f, name=name: [f(data, *shape) for data, shape in zip(coded[name], shapes)]
        for name, f in DECODE.items()
    }
    cpu, sizes = torch.device("cpu"), {name: sum(map(len, data)) for name, data in coded.items()}
    times = [harness.time_all(group, cpu, seconds / 2, least=3) for group in (encoders, decoders)]
    worst = [(len(data) - 200) / entropy for data, entropy in zip(coded["rmt"], entropies) if entropy]
    return {
        "tensors": len(masks), "weights": sum(n * k for n, k in shapes), "off": sum(off), "bytes": sizes,
        "entropy_bytes": sum(entropies), "over_entropy": sizes["rmt"] / sum(entropies) if sum(entropies) else None,
        "worst_less_200": max(worst, default=None),
        **{
            way: {name: dict(zip(("p20", "median", "p80"), t)) for name, t in found.items()}
            for way, found in zip(("encode_ms", "decode_ms"), times)
        },
    }  # fmt: skip


def entropy_bytes(count: int, total: int) -> float:
    p = np.array([count, total - count], float) / total
    return float(-(p * np.log2(p, where=p > 0, out=np.zeros(2))).sum()) * total / 8


if __name__ == "__main__":
    main()
