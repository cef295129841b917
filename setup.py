"""Builds rmt_kernels._C from csrc/ with pybind11 and ninja, without torch.

C++ always (one object per instruction set), CUDA where nvcc is found, GPU or not. What cannot be built is said in one
line and left out: no nvcc, CPU only; no C++ compiler, pure Python. The reason is kept in rmt_kernels/_build_info.json,
where `rmt doctor` reads it. Environment:
    RMT_FORCE_BUILD=1    what cannot be built is an error
    RMT_CUDA_ARCHS       compute capabilities, default "80;90a;80+PTX"; empty: no CUDA
    CXX, NVCC            compilers
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;90a;80+PTX"
_AVX512 = [
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mprefer-vector-width=512",
    "-DRMT_AVX512",
]  # fmt: skip
# Narrowest first; each stands on the ones before it.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-DRMT_AVX2"],
    "avx512": _AVX512,
    "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16", "-DRMT_AMX"],
}
ISA_SOURCES = {
    "baseline": ["elementwise", "mask_update", "masked_linear"],
    "avx2": ["elementwise", "mask_update", "masked_linear"],
    "avx512": ["elementwise", "mask_update", "masked_linear", "weight_grad"],
    "amx": ["masked_linear_amx", "weight_grad"],
}
# No -ffast-math: NaN and signed zero must behave as in the reference. -fno-math-errno lets sqrt become an instruction.
# gcc 12 takes its AVX-512 headers for uninitialized, thousands of times, and returned vectors for an ABI change.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall",
    "-Wno-maybe-uninitialized", "-Wno-psabi",
]  # fmt: skip


class Unavailable(Exception):
    """Why a part is not built."""


def find_cxx() -> list[str]:
    """The compiler's words: CXX may be a wrapper and its compiler, or bring flags."""
    name = os.environ.get("CXX") or "c++"
    program, *rest = shlex.split(name)
    found = shutil.which(program)
    if found is None:
        raise Unavailable(f"no C++ compiler: {name!r} is not on the PATH")
    return [found, *rest]


def supports(cxx: list[str], flags: list[str], tmp: Path) -> bool:
    source = tmp / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*cxx, *flags, str(source), "-o", str(tmp / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def instruction_sets(cxx: list[str], tmp: Path) -> tuple[list[str], dict[str, str]]:
    """The sets to build, and why each other one is left out."""
    isas, left_out = [], {}
    for isa, flags in ISA_FLAGS.items():
        if flags and platform.machine() not in ("x86_64", "AMD64"):
            left_out[isa] = f"not for {platform.machine()}"
        elif isa == "amx" and sys.platform != "linux":
            left_out[isa] = "tiles are asked for as Linux wants it"
        elif left_out:
            left_out[isa] = f"needs {next(iter(left_out))}"
        elif not supports(cxx, flags, tmp):
            left_out[isa] = f"the compiler does not take {' '.join(f for f in flags if f.startswith('-m'))}"
        else:
            isas.append(isa)
    return isas, left_out


def find_nvcc() -> str:
    if not os.environ.get("RMT_CUDA_ARCHS", DEFAULT_ARCHS):
        raise Unavailable("RMT_CUDA_ARCHS is empty")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("NVCC"), home and str(Path(home) / "bin" / "nvcc"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in filter(None, candidates):
        found = shutil.which(candidate)
        if found:
            return found
    raise Unavailable("no nvcc on the PATH, in CUDA_HOME or NVCC")


def gencode() -> list[str]:
    flags = []
    for arch in os.environ.get("RMT_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";"):
        number, ptx = arch.strip().removesuffix("+PTX"), arch.strip().endswith("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


def first_line(command: list[str], pick: int = 0) -> str:
    lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return lines[pick] if lines else "unknown"


class NinjaBuild(build_ext):
    """One extension, compiled by ninja with flags of its own for each source."""

    def build_extension(self, ext: Extension) -> None:
        tmp = Path(self.build_temp).resolve()
        tmp.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        info = {"python": platform.python_version(), "machine": platform.machine(), "cpu": None, "cuda": None}
        forced = os.environ.get("RMT_FORCE_BUILD") == "1"
        try:
            try:
                self.compile(tmp, target, info, cuda=True)
            except Unavailable as reason:
                if forced:
                    raise
                info["cuda"] = f"not built: {reason}"
                print(f"rmt: CPU only, {reason}", file=sys.stderr)
                self.compile(tmp, target, info, cuda=False)
        except Unavailable as reason:
            if forced:
                raise SystemExit(f"rmt: RMT_FORCE_BUILD=1 and {reason}") from None
            info["cpu"] = info["cuda"] = f"not built: {reason}"
            target.unlink(missing_ok=True)
            print(f"rmt: pure Python, {reason}", file=sys.stderr)
        self.info = info

    def run(self) -> None:
        super().run()
        if self.inplace and isinstance(self.info["cpu"], str):
            # An older build's, beside newer Python: setuptools copies a file that there is, and removes none.
            Path(self.get_ext_fullpath("rmt_kernels._C")).unlink(missing_ok=True)
        self.record(self.info)

    def compile(self, tmp: Path, target: Path, info: dict, cuda: bool) -> None:
        import ninja
        import pybind11

        cxx = find_cxx()
        nvcc = find_nvcc() if cuda else None
        openmp = ["-fopenmp"] if supports(cxx, ["-fopenmp"], tmp) else []
        isas, left_out = instruction_sets(cxx, tmp)
        info["cpu"] = {
            "compiler": first_line([*cxx, "--version"]), "isas": isas, "left_out": left_out, "openmp": bool(openmp),
        }  # fmt: skip
        includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{tmp}"]
        if cuda:
            cuda_home = Path(nvcc).resolve().parent.parent
            sources = sorted(str(p.relative_to(CSRC)) for p in (CSRC / "cuda").glob("*.cu"))
            info["cuda"] = {"nvcc": first_line([nvcc, "--version"], -1), "archs": gencode(), "sources": sources}
            includes += [f"-I{cuda_home / 'include'}", "-DRMT_WITH_CUDA"]
        (tmp / "build_info.h").write_text(f"#define RMT_BUILD_INFO {json.dumps(json.dumps(info))}\n")

        edges, objects = [], []

        def compile_to(rule: str, source: Path, name: str, flags: list[str]) -> None:
            objects.append(f"{name}.o")
            edges.append(f"build {name}.o: {rule} {escape(source)}\n  flags = {words(flags)}\n")

        plain = [*CXX_FLAGS, *openmp, *includes]
        compile_to("cxx", CSRC / "bindings.cpp", "bindings", plain)
        known = [f"-DRMT_WITH_{isa.upper()}" for isa in isas]
        compile_to("cxx", CSRC / "cpu" / "dispatch.cpp", "dispatch", [*plain, *known])
        compile_to("cxx", CSRC / "cpu" / "codec.cpp", "codec", plain)
        for isa in isas:
            for source in ISA_SOURCES[isa]:
                flags = [*plain, f"-DRMT_ISA={isa}", *ISA_FLAGS[isa]]
                compile_to("cxx", CSRC / "cpu" / f"{source}.cpp", f"{source}_{isa}", flags)
        if cuda:
            nvcc_flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode()]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                compile_to("nvcc", source, f"cuda_{source.stem}", [*nvcc_flags, f"-I{CSRC}"])
            compile_to("cxx", CSRC / "cuda" / "bindings.cpp", "cuda_bindings", plain)

        # nvcc links its runtime statically: the extension loads without any CUDA installed.
        linker = [nvcc, "-cudart", "static", "-Xcompiler", ",".join(openmp) or "-fPIC"] if cuda else [*cxx, *openmp]
        linker += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        tail = "-MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
        rules = [
            f"rule cxx\n  command = {words(cxx)} $flags -MMD {tail}",
            *([f"rule nvcc\n  command = {words([nvcc])} $flags -MD {tail}"] if cuda else []),
            f"rule link\n  command = {words(linker)} -shared $in -o $out\n",
            *edges,
            f"build {escape(target)}: link {' '.join(objects)}\n",
        ]
        (tmp / "build.ninja").write_text("\n".join(rules))
        binary = Path(ninja.BIN_DIR) / "ninja"
        done = subprocess.run([str(binary), "-C", str(tmp)], capture_output=True, text=True)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            raise Unavailable(f"{'CUDA' if cuda else 'C++'} compilation failed (compiler output above)")

    def record(self, info: dict) -> None:
        homes = [ROOT] if self.inplace else [Path(self.build_lib)]
        for home in homes:
            path = home / "rmt_kernels" / "_build_info.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(info, indent=2) + "\n")


def words(command: list[str]) -> str:
    """Words of a shell's command as ninja reads it: a path may have a space."""
    return shlex.join(command).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    # optional: setuptools then installs without the extension where it could not be built.
    ext_modules=[Extension("rmt_kernels._C", sources=[], optional=os.environ.get("RMT_FORCE_BUILD") != "1")],
    cmdclass={"build_ext": NinjaBuild},
)
