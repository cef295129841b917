"""The import floors of the architecture: a file imports only from the floors below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "rmt_kernels.backends.triton": 2,
    "rmt_kernels.backends": 2,
    "rmt_kernels.reference": 1,
    "rmt_kernels.routing": 1,
    "rmt_kernels.checks": 2,
    "rmt_kernels.ops": 3,
    "rmt_kernels.functions": 3,
    "rmt_kernels": 3,
    "rmt.compact": 4,
    "rmt.masked": 4,
    "rmt.modules": 4,
    "rmt.stacking": 4,
    "rmt.attention": 4,
    "rmt.train": 6,
    "rmt.resume": 6,
    "rmt.schedule": 6,
    "rmt.evaluate": 6,
    "rmt.run": 6,
    "rmt.agreement": 6,
    "rmt.plan": 6,
    "rmt.plan_traffic": 6,
    "rmt.plan_world": 6,
    "rmt.protocols": 7,
    "rmt.ablations": 7,
    "rmt.ablate_command": 7,
    "rmt.demo": 7,
    "rmt.figures": 7,
    "rmt.report": 7,
    "rmt.report_cells": 7,
    "rmt.report_data": 7,
    "rmt.report_means": 7,
    "rmt.report_parts": 7,
    "rmt.report_recipes": 7,
    "rmt.report_sweep": 7,
    "rmt.report_compare": 7,
    "rmt.compare_figures": 7,
    "rmt.table_figures": 7,
    "rmt.commands": 7,
    "rmt.task_commands": 7,
    "rmt.run_commands": 7,
    "rmt.share_commands": 7,
    "rmt.plan_command": 7,
    "rmt.route_command": 7,
    "rmt.compare_command": 7,
    "rmt.sweep": 7,
    "rmt.sweep_command": 7,
    "rmt.peers": 7,
    "rmt.serve": 7,
    "rmt.failures": 7,
    "rmt.cli": 7,
    "rmt.doctor": 7,
    "rmt.__main__": 8,
    "rmt": 5,
}  # the package itself re-exports floor 5: what stands above it says so here
# The files that know the house we live in: loading, a model without weights, the demo's own, writing a merged one,
# ImageNet's class names.
OPEN_CLIP = ("rmt.clip", "rmt.skeleton", "rmt.upstream", "rmt.merge", "rmt.data.imagenet")
FILES = sorted(p for package in ("rmt", "rmt_kernels") for p in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, at_module_level_only: bool = False) -> set[str]:
    """Absolute names of the modules a file imports; `from . import x` is package.x where that is a module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    found = set()
    for node in ast.walk(tree):
        if at_module_level_only and node in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            found |= {full if is_module(full := f"{origin}.{alias.name}") else origin for alias in node.names}
    return found


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def floor(name: str) -> int | None:
    while name:
        if name in FLOORS:
            return FLOORS[name]
        name = name.rpartition(".")[0]
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_below(path):
    name, mine = module_name(path), floor(module_name(path))
    for other in filter(is_module, imports(path)):
        assert floor(other) <= mine, f"{name} (floor {mine}) imports {other} (floor {floor(other)})"
    outside = top(imports(path))
    assert not outside & {"bench", "tests", "helpers", "conftest"}, "bench and tests are imported by nothing"
    if name.startswith("rmt_kernels"):
        assert not outside & {"rmt", "open_clip"}, "the kernels know nothing of CLIP"
    if not name.startswith("rmt_kernels.backends.triton"):
        assert "triton" not in outside, "triton only under rmt_kernels/backends/triton"
    if name not in OPEN_CLIP:
        assert "open_clip" not in outside, f"open_clip only in {', '.join(OPEN_CLIP)}"
    text = path.read_text()
    if name != "rmt_kernels.ops":
        assert "torch.library" not in re.sub(r'""".*?"""|#.*', "", text, flags=re.S), "only ops.py registers ops"
    if name in ("rmt_kernels.reference", "rmt_kernels.routing"):
        assert outside == {"torch"}
    if name.startswith("rmt."):
        private = {i for i in imports(path) if i.startswith(("rmt_kernels.backends", "rmt_kernels.ops"))}
        assert not private or name in ("rmt.doctor", "rmt.cli"), f"rmt sees kernels only by rmt_kernels: {private}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_open_clip_and_triton_are_never_imported_with_the_package(path):
    eager = top(imports(path, at_module_level_only=True))
    assert "open_clip" not in eager, "import it where it is used: `import rmt` must stay light"
    if path.parent.name != "triton":
        assert not {"triton", "tqdm", "safetensors", "PIL", "torchvision"} & eager or module_name(path) != "rmt"


def test_the_lint_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = tmp_path / "rmt_kernels" / "backends" / "bad.py"
    bad.parent.mkdir(parents=True)
    for other in ("ops", "reference"):
        (tmp_path / "rmt_kernels" / f"{other}.py").touch()
    bad.write_text("from .. import ops\nfrom ..reference import pack_bits\ndef f():\n    import open_clip\n")
    assert imports(bad) >= {"rmt_kernels.ops", "rmt_kernels.reference", "open_clip"}
    assert "open_clip" not in imports(bad, at_module_level_only=True)
    assert floor("rmt_kernels.ops.x") == 3 and floor("rmt_kernels.backends.bad") == 2 and floor("torch") is None
