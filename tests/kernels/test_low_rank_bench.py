"""bench/routed_low_rank.py: checked before it is timed, and rows that say where they come from."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_routed_low_rank", BENCH / "routed_low_rank.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.SHAPES, "CoCa-B/32", (2, 20, 16, 4, 1))
    return module


def run(bench, monkeypatch, path):
    arguments = ["--device", "cpu", "--quick", "--seconds", "0", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["routed_low_rank.py", *arguments])
    bench.main()


def test_every_function_both_ways(bench, monkeypatch, tmp_path, capsys):
    run(bench, monkeypatch, tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["function"], r["op"]) for r in rows] == [
        (f, op) for f in ("none", "add", "mul", "expand", "gram") for op in ("forward", "forward and backward")
    ]
    for r in rows:
        assert {"commit", "date", "torch", "device_name", "dtype"} <= r.keys()
        assert r["ms"].keys() == r["error"].keys() >= {"plain", "rmt"} and r["thin"] == (
            r["function"] in ("expand", "gram")
        )
        assert r["plain_over_rmt"] == r["ms"]["plain"]["median"] / r["ms"]["rmt"]["median"]
    forward = [r for r in rows if r["op"] == "forward"]
    assert {r["fused_bytes"] for r in forward} == {4 * (3 * 2 * 20 * 16 + 2 * 4 * 16)}
    assert forward[3]["spared_share"] < 0.05 < forward[2]["spared_share"]
    assert "plain / rmt" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(bench, monkeypatch, tmp_path):
    right = bench.rk.routed_low_rank
    monkeypatch.setattr(bench.rk, "routed_low_rank", lambda *args: right(*args) + 1e-3)
    with pytest.raises(SystemExit, match="rmt's error"):
        run(bench, monkeypatch, tmp_path / "rows.json")
    assert not (tmp_path / "rows.json").exists()
