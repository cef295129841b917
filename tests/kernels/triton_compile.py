"""Compiles what the Triton launchers launch, for any GPU and without one; reads registers, spills and SASS."""

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmt_kernels.backends.triton import grad, launch, linear, update

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclasses.dataclass
class Compiled:
    name: str
    registers: int
    spills: int
    shared: int
    warnings: list[str]
    ptx: str
    cubin: bytes


@contextlib.contextmanager
def recorded_launches(capability: int, precision: str) -> Iterator[list[tuple]]:
    """Launchers called inside append (kernel, args, constants) instead of running, as on a GPU of this capability."""
    seen = []
    with contextlib.ExitStack() as stack:
        for module in (linear, grad, update):
            patch = mock.patch.object(
                module, "launch", lambda kernel, blocks, out, *a, **c: seen.append((kernel, a, c))
            )
            stack.enter_context(patch)
        # Addresses of tensors that are nowhere: only the table's type decides what is compiled.
        table = torch.empty((1, 3), dtype=torch.int64, device="meta")
        stack.enter_context(mock.patch.object(linear, "upload", lambda rows, device: table))
        stack.enter_context(mock.patch.object(launch, "capability", lambda device: capability))
        stack.enter_context(mock.patch.object(launch, "precision", lambda dtype, device: precision))
        yield seen


def source(kernel, args: tuple, constants: dict) -> ASTSource:
    """What Triton's launcher would specialise on: None and 1 are constants, pointers and multiples of 16 aligned."""
    signature, fixed, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = args[i] if i < len(args) else constants[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[param.name], fixed[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], attrs[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attrs)


def compile_launch(capability: int, precision: str, call: Callable[[], None]) -> Compiled:
    """Compiles the one kernel that `call` launches."""
    with recorded_launches(capability, precision) as seen:
        call()
    ((kernel, args, constants),) = seen
    options = launch.OPTIONS | {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    target = GPUTarget("cuda", capability, 32)
    log = io.StringIO()
    # Only a compilation that is not read from the cache runs ptxas, whose words are what the tests want.
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source(kernel, args, constants), target=target, options=options)
    log = log.getvalue()
    return Compiled(
        name=kernel.fn.__name__,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spills=int(re.search(r"(\d+) bytes spill stores", log).group(1)),
        shared=built.metadata.shared,
        warnings=re.findall(r"C75\d\d.*", log),
        ptx=built.asm["ptx"],
        cubin=built.asm["cubin"],
    )


# --- SASS lint --------------------------------------------------------------------------------------------------------

# Instructions that write no general register, and HGMMA, whose accumulator is no operand of a neighbour.
NO_DESTINATION = (
    "ATOM", "BAR", "BRA", "DEPBAR", "EXIT", "FSETP", "HGMMA", "ISETP", "LDGSTS", "NOP", "PLOP3", "RED", "STG", "STS",
    "SYNCS", "UTMALDG", "WARPGROUP",
)  # fmt: skip


def disassemble(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(TOOLS, "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def fragment(op: str) -> set[int]:
    """Registers of the A operand of an HGMMA that takes it from registers; empty where it comes from shared memory."""
    match = re.search(r"HGMMA\S* R\d+, R(\d+),", op)
    return set(range(int(match[1]), int(match[1]) + 4)) if match else set()


def _written(op: str) -> set[int]:
    op = re.sub(r"^@!?U?P\w+ ", "", op)
    name = op.split()[0]
    match = re.match(r"\S+ (?:U?P\w+, )*R(\d+)", op)
    if name.split(".")[0] in NO_DESTINATION or not match:
        return set()
    wide = 4 if ".128" in name or "LDSM" in name else 2 if ".64" in name or "WIDE" in name else 1
    return set(range(int(match[1]), int(match[1]) + wide))


def overwritten_fragments(listing: list[str]) -> list[str]:
    """Instructions that write an A-fragment register of an HGMMA that may still be pending.

    The innermost loop around the HGMMAs is read twice in a row, so that the second round sees what the first left
    pending. Triton 3.6 emits such code for masked left operands (kernels.md 1c). A wait on an HGMMA's read barrier
    would make it safe; this reading knows none, and so errs on the strict side.
    """
    ops, labels = [], {}
    for line in listing:
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(ops)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            ops.append(re.sub(r"\s+", " ", match[1]).strip())
    loaded = [i for i, op in enumerate(ops) if fragment(op)]
    if not loaded:
        return []
    jumps = [(i, labels.get(m[1], i)) for i, op in enumerate(ops) if (m := re.search(r"BRA\S* .*?(\.L_x_\d+)", op))]
    loops = [(end - start, start, end) for end, start in jumps if start <= loaded[0] and end >= loaded[-1]]
    _, start, end = min(loops, default=(0, 0, len(ops) - 1))
    pending, found = [], []
    for op in ops[start : end + 1] * 2:
        found += [op for registers in pending if registers & _written(op)]
        if "HGMMA" in op:
            pending.append(fragment(op))
        if match := re.search(r"DEPBAR\.LE gsb0, (0x[0-9a-f]+)", op):
            pending = pending[len(pending) - int(match[1], 16) :] if int(match[1], 16) else []
    return found
