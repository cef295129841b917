"""rmt sweep: what a file may hold, what makes two runs the same, the lock, the table, and worker processes that die."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import rmt.run
from rmt import clip
from rmt.cli import main
from rmt.config import RunConfig, UserError, build
from rmt.report_compare import report
from rmt.sweep import holder, identity, local, lock, share, work
from rmt.sweep.drive import Engine, planned, sweep
from rmt.sweep.holder import Holder
from rmt.sweep.identity import Contents, identify
from rmt.sweep.jobs import Job
from rmt.sweep.lock import LOCK_FILE, locked
from rmt.sweep.spec import expand, read_spec
from rmt.sweep.table import TABLE_FILE, Table

MIXED = {
    "base": {"model": "local-dir:m", "train": {"steps": 2}, "root": "r"}, "datasets": ["dtd", "eurosat"],
    "shots": [1, "all"], "seeds": [1, 2, 3], "settings": {"lr": [1e-3, 2e-3], "mask.targets": [["attention"], ["mlp"]]},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and data, and what a sweep of runs of one step says of them."""
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data", train=4, test=3)
    train = {"lr": 2e-3, "steps": 1, "batch": 8, "log_every": 1, "save_every": 0}
    base = {"model": tiny.model_folder(root / "model"), "data": str(root / "data"), "device": "cpu", "train": train}
    return root, {"base": base, "shots": [2], "seeds": [1, 2]}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return out, sweep(spec_file(out, files[1]), out, Engine(workers=1))


@pytest.fixture
def here(monkeypatch):
    """Runs in this process in place of workers: the same `execute`. Returns the labels of what ran."""
    ran = []

    def outcomes(jobs, out, **options):
        for job in jobs:
            ran.append(job.run.label)
            yield work.execute(job.folder)

    monkeypatch.setattr(local, "outcomes", outcomes)
    return ran


def spec_file(folder: Path, values: dict) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / TABLE_FILE).read_text().splitlines()]


def test_the_cross_product():
    runs = expand(MIXED)
    assert len(runs) == 2 * 2 * 2 * 2 * 3 == len({run.label for run in runs})
    assert {run.config.dataset for run in runs} == {"dtd", "eurosat"} and {r.config.shots for r in runs} == {1, "all"}
    last = runs[-1]
    assert last.config.train.lr == 2e-3 and last.config.mask.targets == ("mlp",) and last.config.train.steps == 2
    assert last.label == "eurosat train shotsall seed3 lr=0.002 targets=mlp"
    assert last.config.model == f"local-dir:{os.path.abspath('m')}" and last.config.root == os.path.abspath("r")
    cells = expand({**MIXED, "methods": ["ramt+tip", "lora"], "settings": {}, "options": {"views": 3}})
    assert {run.method for run in cells} == {"tip+ramt", "lora"} and cells[0].options.views == 3


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("base: {model: 'local-dir:m', data: d}\nsettings: {lr: [1e-3, 2E-4, 0.5]}\n")
    assert [run.config.train.lr for run in read_spec(path)] == [1e-3, 2e-4, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [1]}, "a sweep has no 'seed': did you mean seeds"),
        ({"seeds": []}, "seeds must be a list of at least one value, got"),
        ({"seeds": 3}, "seeds must be a list of at least one value, got 3"),
        ({"seeds": [1, 1]}, "seeds must name each value once, got 1 twice"),
        ({"seeds": [-1]}, "seed must be an integer from 0"),
        ({"shots": [0]}, "shots must be an integer of at least 1, or all, got 0"),
        ({"settings": {"lrr": [1]}}, "a run has no option 'lrr': did you mean lr"),
        ({"settings": {"lr": [-1]}}, "lr must be a finite number above 0"),
        ({"settings": {"seed": [1]}}, "settings cannot vary seed"),
        ({"methods": ["lorra"]}, "no method 'lorra': did you mean lora"),
        ({"methods": ["tip+ramt", "ramt+tip"]}, "methods must name each value once"),
        ({"options": {"views": 1}}, "options are those of rmt compare: they need methods"),
        ({"methods": ["lora"], "options": {"view": 1}}, "options has no 'view': did you mean views"),
        ({"base": {"model": "local-dir:m"}}, "a run needs data, or root and dataset"),
        ({"base": {"model": "local-dir:m"}, "datasets": ["a/x", "b/x"]}, "differ in their last names"),
        ({"seeds": list(range(50_000))}, "a sweep may have 100,000 runs, got 800,000"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(change, message):
    with pytest.raises(UserError, match=message):
        expand(change if "base" in change else MIXED | change)


def test_an_identity_is_of_config_data_model_and_code(files, tmp_path, monkeypatch):
    root, values = files
    run, other = expand(values)
    first = identify(run, Contents(tmp_path))
    assert identify(run, Contents(tmp_path)) == first and identify(other, Contents(tmp_path))["id"] != first["id"]
    same = {**values, "base": values["base"] | {"train": values["base"]["train"] | {"strength": 1}}}
    whole = expand({**same, "settings": {"strength": [1.0]}})[0]
    assert identify(whole, Contents(tmp_path))["id"] == identify(expand(same)[0], Contents(tmp_path))["id"]
    # Kept: nothing is read again. Changed: of one byte, without another size.
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_file_sha256", lambda path: pytest.fail("a kept hash reads nothing"))
        assert identify(run, Contents(tmp_path)) == first
    image = next((root / "data" / "train").rglob("*.png"))
    before = image.read_bytes()
    try:
        image.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        changed = identify(run, Contents(tmp_path))
    finally:
        image.write_bytes(before)
    assert changed["id"] != first["id"] and changed["model"] == first["model"] and changed["data"] != first["data"]
    monkeypatch.setattr(identity, "code_sha256", lambda: "other code")
    assert identify(run, Contents(tmp_path))["id"] != first["id"]


def test_two_workers_one_killed_and_nothing_twice(files, tmp_path):
    """SIGKILL in the middle of a run: it is started again, goes on, and the table has each run once."""
    values = files[1] | {"seeds": [1, 2, 3]}
    values["base"] = values["base"] | {"train": values["base"]["train"] | {"steps": 40}}
    killed = []

    def kill():
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            for path in tmp_path.glob("runs/*/last.pt"):
                state = json.loads((path.parent / "state.json").read_text())
                if state["status"] == "running":
                    os.kill(state["pid"], signal.SIGKILL)
                    killed.append(path.parent.name)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    ended = sweep(spec_file(tmp_path, values), tmp_path, Engine(workers=2, retries=1))
    thread.join()
    assert killed and [row["status"] for row in ended] == ["done"] * 3
    table = rows(tmp_path)
    assert len(table) == 3 == len({row["id"] for row in table})
    assert {row["run"]: row["attempt"] for row in table if row["attempt"] != 1} == {killed[0]: 2}
    assert "resume     from step" in (tmp_path / "runs" / killed[0] / "log.txt").read_text()


def test_a_killed_sweep_leaves_no_worker_and_goes_on(files, tmp_path, here, capsys):
    """SIGKILL to the driver: its worker ends too, and the same sweep takes lock and resume file over."""
    values = files[1] | {"seeds": [1]}
    values["base"] = values["base"] | {"train": values["base"]["train"] | {"steps": 150}}
    spec, out = spec_file(tmp_path, values), tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(clip.__file__).parents[1])}
    command = [sys.executable, "-m", "rmt.cli", "sweep", str(spec), "--out", str(out), "--workers", "1"]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not (found := list(out.glob("runs/*/last.pt"))):
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    pid = json.loads((found[0].parent / "state.json").read_text())["pid"]
    while lock._started(pid) is not None:
        assert time.monotonic() < until, "the worker outlives its driver"
        time.sleep(0.02)
    assert [state for _, state in planned(spec, out)] == ["started"]
    (row,) = sweep(spec, out)
    assert row["status"] == "done" and row["attempt"] == 2 and rows(out) == [row]
    assert f"was of process {driver.pid}, which is dead: taken over" in capsys.readouterr().out
    assert "resume     from step" in (found[0].parent / "log.txt").read_text()


def test_the_command(files, finished, tmp_path, capsys):
    out = finished[0]
    assert main(["sweep", str(out / "sweep.yaml"), "--out", str(out), "--dry-run"]) == 0
    assert "finished  data train shots2 seed1" in (said := capsys.readouterr().out) and "2 runs, 2 finished" in said
    bad = spec_file(tmp_path, files[1] | {"shots": [0]})
    assert main(["sweep", str(bad), "--out", str(tmp_path / "out")]) == 2
    assert f"rmt: error: {bad}: shots must be an integer" in capsys.readouterr().err


@pytest.mark.parametrize(("workers", "threads"), [(None, 1), (2, 2), (3, 1)])
def test_threads_of_a_run_do_not_depend_on_how_many_are_left(files, tmp_path, monkeypatch, workers, threads):
    """A gradient of a convolution has other last bits with another number of threads."""
    runs = expand(files[1] | {"seeds": [1, 2, 3, 4]})
    jobs, given = [Job(run, tmp_path / str(n), {"id": str(n)}) for n, run in enumerate(runs)], []

    def give(self, job):
        self.job = job
        given.append(len(self.cores))

    monkeypatch.setattr(local, "cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(local._Worker, "give", give)
    monkeypatch.setattr(local, "_ready", lambda pool: pytest.fail("enough"))
    for left in (jobs, jobs[:3], jobs[:1]):
        given.clear()
        with pytest.raises(pytest.fail.Exception, match="enough"):
            list(Engine(workers=workers).outcomes(left, tmp_path, jobs))
        assert given == [threads] * min(len(left), workers or 4)


def test_a_run_that_always_dies_fails_alone(files, tmp_path, monkeypatch):
    """With no retry left its row says how it died; the other runs are done."""
    job = Job.make(expand(files[1])[0], identify(expand(files[1])[0], Contents(tmp_path)), tmp_path)
    job.write()
    real = local._Worker._start

    def start(self):
        real(self)
        self.process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(local._Worker, "_start", start)
    ended = local.outcomes([job], tmp_path, sweep=[job], workers=1, retries=1)
    (row,) = [one for one in ended if isinstance(one, dict)]
    assert row["status"] == "failed" and "ended by SIGKILL (out of memory?)" in row["why"] and "2 times" in row["why"]


def test_finished_runs_are_skipped_and_the_table_is_mended(finished, files, tmp_path, here, capsys):
    out, first = finished
    assert [row["status"] for row in first] == ["done", "done"] and rows(out) == first
    assert {row["seed"]: row["attempt"] for row in first} == {1: 1, 2: 1}
    path = out / TABLE_FILE
    whole = path.read_bytes()
    assert sweep(out / "sweep.yaml", out) == first and path.read_bytes() == whole and here == []
    # Cut in the middle of a line; a row of a run that is not there; a row twice.
    path.write_bytes(whole[: len(whole) // 2 + 40])
    assert sweep(out / "sweep.yaml", out) == first and rows(out) == first
    assert "was damaged in 1 lines: made anew from the run folders" in capsys.readouterr().out
    path.write_bytes(whole + whole.splitlines(keepends=True)[0].replace(first[0]["id"].encode(), b"gone") + whole)
    assert sweep(out / "sweep.yaml", out) == first and path.read_bytes() == whole and here == []
    # A result that is cut short does not count, and its run is made again with the same numbers.
    result = Job.read(out / "runs" / first[1]["run"]).result_path
    result.write_bytes(result.read_bytes()[:100])
    again = sweep(out / "sweep.yaml", out)
    assert len(here) == 1 and again[0] == first[0] and len(rows(out)) == 2
    assert again[1]["attempt"] == 2 and again[1]["acc1"] == first[1]["acc1"]


def test_a_row_is_added_once(finished, tmp_path):
    out, first = finished
    jobs = [job for job, _ in planned(out / "sweep.yaml", out)]
    table = Table(out, jobs)
    before = (out / TABLE_FILE).read_bytes()
    assert not table.add(first[0]) and (out / TABLE_FILE).read_bytes() == before


def test_failures_stay_with_their_run_and_are_tried_again(files, tmp_path, here, capsys):
    root, values = files
    picture = sorted((root / "data" / "test").rglob("*.png"))[0]
    values = values | {"methods": ["zeroshot", "cocoop"], "options": {"views": 1, "max_steps": 1}}
    values = values | {"seeds": [1], "base": values["base"] | {"template": "{}"}}
    before = picture.read_bytes()
    picture.write_bytes(b"no image")
    try:
        ended = sweep(spec_file(tmp_path, values), tmp_path)
    finally:
        picture.write_bytes(before)
    assert [row["status"] for row in ended] == ["failed"] * 2 and "cannot be read as an image" in ended[0]["why"]
    assert str(picture) in ended[0]["why"] and "failed: " in capsys.readouterr().out
    report([tmp_path], tmp_path / "r.html")
    assert "cannot be read as an image" in (tmp_path / "r.html").read_text()
    # The image is whole again: other data, so other runs; the table has those that were asked for last.
    mended = sweep(tmp_path / "sweep.yaml", tmp_path)
    assert [row["status"] for row in mended] == ["done"] * 2 and rows(tmp_path) == mended
    report([tmp_path], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "2 of 2 runs done, 0 failed" in page and "CoCoOp" in page


def test_an_unfinished_run_goes_on_where_only_its_writing_has_changed(files, tmp_path, here, monkeypatch):
    """Defaults that are written out, and 1 for 1.0: the same identity, so the same folder."""
    train = {"steps": 6, "batch": 8, "strength": 1.0, "log_every": 1, "save_every": 0}
    values = {"base": files[1]["base"] | {"train": train}, "shots": [2], "seeds": [1]}

    def log(file, advance, row):
        assert row["step"] < 4, "killed"

    with monkeypatch.context() as patch:
        patch.setattr(rmt.run, "_log", log)
        (first,) = sweep(spec_file(tmp_path, values), tmp_path)
    assert "AssertionError: killed" in first["why"]
    values["base"]["train"] = train | {"strength": 1, "lr": 8e-5, "epochs": None}
    (row,) = sweep(spec_file(tmp_path, values | {"base": values["base"] | {"preset": "ramt"}}), tmp_path)
    assert (row["status"], row["id"], row["attempt"]) == ("done", first["id"], 2), row
    assert "resume     from step 3 of 6" in (tmp_path / "runs" / row["run"] / "log.txt").read_text()


def test_a_length_that_is_asked_for_is_another_run_than_one_that_may_be_stretched(files, tmp_path):
    def made(**train):
        base = files[1]["base"] | {"train": {"batch": 8, **train}}
        return identify(expand({"base": base})[0], Contents(tmp_path))["id"]

    assert made() != made(epochs=30) == made(epochs=30, schedule="auto")
    assert made(schedule="paper") == made(schedule="paper", epochs=30) != made()


def test_a_dry_run_writes_nothing(files, finished, tmp_path):
    path = spec_file(tmp_path, files[1] | {"seeds": [1, 3]})
    before = sorted(finished[0].rglob("*"))
    assert [state for _, state in planned(path, finished[0])] == ["finished", "new"]
    assert [state for _, state in planned(path, tmp_path / "none")] == ["new", "new"]
    assert sorted(finished[0].rglob("*")) == before and not (tmp_path / "none").exists()


def lock_of(folder: Path, **changed) -> Path:
    with locked(folder):
        owner = json.loads((folder / LOCK_FILE).read_text())
    (folder / LOCK_FILE).write_text(json.dumps(owner | changed))
    return folder / LOCK_FILE


def test_two_sweeps_in_one_folder(tmp_path, capsys):
    with locked(tmp_path) as held:
        with (
            pytest.raises(
                UserError, match=rf"another sweep is at work.*process {os.getpid()} on {socket.gethostname()}"
            ),
            locked(tmp_path),
        ):
            pytest.fail("two sweeps hold one lock")
        assert (tmp_path / LOCK_FILE).is_file(), "who is refused takes no lock away"
        held.owner["beat"] -= 60
        (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(UserError, match="is not this sweep's any more"):
            held.beat()
    # Dead: a process that ended, and a number that another process has now.
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for dead in ({"pid": done.pid}, {"pid": os.getpid(), "started": "1"}):
        lock_of(tmp_path, **dead)
        with locked(tmp_path):
            assert f"was of process {dead['pid']}, which is dead: taken over" in capsys.readouterr().out
    assert not (tmp_path / LOCK_FILE).exists()
    path = lock_of(tmp_path, host="elsewhere", pid=done.pid)
    with pytest.raises(UserError, match=f"on elsewhere since .*; if it is dead, delete {path}"), locked(tmp_path):
        pass
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged: delete it"), locked(tmp_path):
        pass


def test_a_clock_that_is_off(finished, files, tmp_path):
    lock_of(tmp_path, beat=time.time() + 3600, host="elsewhere")
    with pytest.raises(UserError, match=r"clock of .* is off: .*process \d+ on elsewhere, is from 3,\d{3} s"):
        sweep(spec_file(tmp_path, files[1]), tmp_path)
    job = planned(finished[0] / "sweep.yaml", finished[0])[0][0]
    moved = Job(job.run, tmp_path / "run", job.identity)
    moved.write()
    (moved.folder / "state.json").write_text(json.dumps({"time": time.time() + 3600, "attempt": 1}))
    row = work.execute(moved.folder)
    assert row["status"] == "failed" and "clock" in row["why"] and row["attempt"] == 2


def test_a_node_without_data_or_with_other_code(finished, monkeypatch):
    job = planned(finished[0] / "sweep.yaml", finished[0])[0][0]
    work.need_node(job, "n1")
    with pytest.raises(UserError, match="node n1 has other code than the sweep was started with"):
        work.need_node(Job(job.run, job.folder, job.identity | {"code": "x"}), "n1")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    with pytest.raises(UserError, match=f"node n1 has no data at {job.run.config.data}"):
        work.need_node(job, "n1")


def test_a_handed_backbone_gives_the_same_bits_and_is_never_written(files, finished, tmp_path, monkeypatch):
    """Also by methods that train the weights themselves."""
    values = files[1]
    more = {"methods": ["full_ft", "ln", "lora+ramt"], "options": {"views": 1, "max_steps": 1, "max_feature_steps": 1}}
    runs = [expand(values)[0], *expand(values | more | {"seeds": [1]})]
    model, data = share.pack_model(runs[0].config), share.pack_files(runs[0].config)
    before = {name: array.tobytes() for name, array in model.arrays.items()}
    monkeypatch.setattr(clip, "_make", lambda *args: pytest.fail("the model is read from a disk"))
    monkeypatch.setattr(Path, "read_bytes", _no_image(Path.read_bytes))
    with share.handed(model, data):
        for run in runs:
            job = Job.make(run, identify(run, Contents(finished[0])), tmp_path)
            job.write()
            row = work.execute(job.folder)
            assert row["status"] == "done", row
            if run.method is None:
                with_files = Job.read(finished[0] / "runs" / finished[1][0]["run"]).result()
                assert job.result()["bits_sha256"] == with_files["bits_sha256"] and row["id"] == finished[1][0]["id"]
    assert {name: array.tobytes() for name, array in model.arrays.items()} == before
    assert not clip.HANDED


def _no_image(read):
    def checked(path):
        assert path.suffix != ".png", "an image is read from a disk"
        return read(path)

    return checked


def test_slurm_by_submitit_s_local_executor(files, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'rmt[slurm]'")
    engine = Engine("slurm", workers=1, slurm={"cluster": "local", "timeout_min": 5})
    ended = sweep(spec_file(tmp_path, files[1] | {"seeds": [1]}), tmp_path, engine)
    assert [row["status"] for row in ended] == ["done"] and rows(tmp_path) == ended
    with pytest.raises(UserError, match=r"submitit takes no such parameters: .*partiton"):
        Engine("slurm", slurm={"cluster": "debug", "slurm_partiton": "a"}).outcomes([], tmp_path, []).__next__()
    with pytest.raises(UserError, match="cluster must be one of slurm, local, debug, got 'moon'"):
        Engine("slurm", slurm={"cluster": "moon"}).outcomes([], tmp_path, []).__next__()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "dask"}, "engine must be one of local, ray, slurm, got 'dask'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"cpus": 0}, "a run needs more than 0 cpus"),
    ],
)
def test_an_engine_is_checked(given, message):
    with pytest.raises(UserError, match=message):
        Engine(**given)


READER = """
import sys
from rmt.sweep.holder import mapped

found = mapped(sys.stdin.buffer.read())
print(sum(t.double().sum().item() for t in found.values()))
next(iter(found.values())).flatten()[0] = 7.0
"""


def test_what_a_holder_keeps_another_process_maps_and_does_not_copy(files):
    """The other process writes a number, which no run does, and the holder sees it."""
    packed = share.pack_model(build(RunConfig, files[1]["base"], "a test"))
    kept = Holder()
    handles = kept.handles(packed, "cpu")
    again = kept.handles(packed, "cpu")
    assert len(handles) < 0.2 * packed.size, "handles, no numbers"
    command, env = [sys.executable, "-c", READER], os.environ | {"PYTHONPATH": str(Path(clip.__file__).parents[1])}
    said = [subprocess.run(command, input=sent, env=env, capture_output=True, timeout=60) for sent in (handles, again)]
    assert [one.returncode for one in said] == [0, 0], said[0].stderr.decode()
    mine = holder.mapped(kept.handles(packed, "cpu"))
    first = next(iter(mine.values())).flatten()
    assert first[0] == 7.0 and first.data_ptr() == next(iter(kept._kept.values()))[next(iter(mine))].data_ptr()
    total = sum(float(array.astype("f8").sum()) for array in packed.arrays.values())
    assert float(said[0].stdout) == pytest.approx(total)
    made = share.unpack_model(packed, torch.device("cpu"), mine).model.state_dict()
    assert all(made[name].data_ptr() == mine[name].data_ptr() for name in made)
