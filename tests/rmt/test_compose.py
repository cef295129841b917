import dataclasses

import numpy as np
import pytest
import tiny
import torch
from test_compare import CONV, task

import rmt
import rmt_kernels as rk
from rmt.checkpoint import load_task, write_task
from rmt.cli import main
from rmt.compose import OPERATIONS, compose
from rmt.config import UserError
from rmt.evaluate import read_run
from rmt.files import sha256

PLACES = (range(0, 100), range(60, 300), range(90, 400, 3))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compose")
    return [task(folder / name, off) for name, off in zip("abc", PLACES)]


def off_places(made, key=CONV):
    return set(np.flatnonzero(~rk.unpack_bits(made.bits[key], made.shapes[key][1]).numpy()).tolist())


def expected(operation, sets, votes=None):
    counts = {place: sum(place in one for one in sets) for place in set().union(*sets)}
    need = {"union": 1, "intersection": len(sets), "vote": votes or len(sets) // 2 + 1}.get(operation)
    if operation == "difference":
        return sets[0] - set().union(*sets[1:])
    return {place for place, count in counts.items() if count >= need}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_sets_of_what_is_off(tasks, operation, count):
    sets = [set(places) for places in PLACES[:count]]
    made = compose(operation, tasks[:count])
    assert off_places(made) == expected(operation, sets)
    for key in set(made.bits) - {CONV}:
        assert torch.equal(made.bits[key], tasks[0].bits[key]), "all on, pad bits 0"
    assert made.bits_sha256 == sha256(made.bits) and made.base_sha256 == tasks[0].base_sha256
    parts = [{"name": name, "bits_sha256": t.bits_sha256} for name, t in zip("abc", tasks[:count])]
    votes = {"votes": 2} if operation == "vote" else {}
    assert made.config["composed"] == {"operation": operation, "of": parts} | votes
    assert tasks[0].off(CONV) == 100, "the parts stay as they are"


def test_votes_count(tasks):
    sets = [set(places) for places in PLACES]
    for votes, same in ((1, "union"), (2, None), (3, "intersection")):
        made = compose("vote", tasks, votes)
        assert off_places(made) == expected("vote", sets, votes)
        assert same is None or made.bits_sha256 == compose(same, tasks).bits_sha256
    assert compose("vote", tasks[:2]).bits_sha256 == compose("intersection", tasks[:2]).bits_sha256, "more than half"


def test_pad_bits_stay_zero(tmp_path):
    """width 40: in_proj has 40 columns, 24 pad bits a row."""
    a, b = (task(tmp_path / name, (i,), width=40, head_width=20) for i, name in enumerate("ab"))
    for operation in OPERATIONS:
        write_task(tmp_path / operation, compose(operation, [a, b]))
        load_task(tmp_path / operation)  # refuses pad bits


def test_a_written_one_is_a_task_like_others(tasks, tmp_path):
    made = write_task(tmp_path / "made", compose("union", tasks))
    again = load_task(tmp_path / "made")
    assert again.bits_sha256 == made.bits_sha256 and again.config == made.config
    assert (again.classnames, again.template, again.model) == (("cat",), "a {}.", "local-dir:x")
    model = rmt.MaskModel.from_pretrained(tiny.model(), tmp_path / "made")
    assert off_places(again) == {int(i) for i in np.flatnonzero(model.masks[0].dense.numpy() == 0)}
    config, _ = read_run(tmp_path / "made", data="somewhere")
    assert config.data == "somewhere", "rmt eval takes it"


def test_names_are_kept_where_all_agree_and_given_otherwise(tasks):
    features = torch.eye(1, 32)
    with_features = [dataclasses.replace(t, text_features=features.clone()) for t in tasks]
    other = dataclasses.replace(with_features[1], classnames=("dog",), template=None, pretrained="y")
    same = compose("union", with_features)
    assert same.classnames == ("cat",) and torch.equal(same.text_features, features)
    made = compose("union", [with_features[0], other])
    assert (made.classnames, made.template, made.pretrained, made.text_features) == ((), None, None, None)
    made = compose("union", [with_features[0], other], classnames=["x", "y"], template="b {}.")
    assert (made.classnames, made.template, made.text_features) == (("x", "y"), "b {}.", None)
    assert compose("union", with_features, template="b {}.").text_features is None
    assert compose("union", [with_features[0], tasks[1]]).text_features is None


def test_what_could_be_off_is_known_only_of_what_must_be_so(tasks):
    few = [dataclasses.replace(t, selected={CONV: count}) for t, count in zip(tasks, (350, 350, 9000))]
    assert compose("union", few[:2]).selected == {CONV: 350} == compose("difference", few).selected
    assert compose("union", few).selected == {} and compose("union", [few[0], tasks[1]]).selected == {}
    # 300 off of a selection of 250 means that it was not one selection.
    assert compose("union", [dataclasses.replace(t, selected={CONV: 250}) for t in tasks[:2]]).selected == {}


def test_refusals(tasks, tmp_path):
    with pytest.raises(UserError, match="operation must be one of union, intersection, difference, vote, got 'sum'"):
        compose("sum", tasks)
    with pytest.raises(UserError, match="union needs two tasks or more, got 1"):
        compose("union", tasks[:1])
    with pytest.raises(UserError, match="must be of one base model"):
        compose("union", [tasks[0], task(tmp_path / "other", seed=1)])
    for votes in (0, 4, True, 1.5):
        with pytest.raises(UserError, match="votes must be 1 to 3"):
            compose("vote", tasks, votes)
    with pytest.raises(UserError, match="votes are of the operation vote"):
        compose("union", tasks, 2)


def test_the_command_writes_a_task_folder(tasks, tmp_path, capsys):
    paths = [str(t.path.parent) for t in tasks]
    assert main(["compose", "vote", *paths, "--votes", "2", "--out", str(tmp_path / "made")]) == 0
    made = load_task(tmp_path / "made")
    assert off_places(made) == expected("vote", [set(p) for p in PLACES], 2)
    out = capsys.readouterr().out
    assert f"{made.off(CONV)} of 45,056 weights off" in out
    assert "vote of a, b, c" in (tmp_path / "made" / "README.md").read_text()
    assert main(["compose", "union", paths[0], "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists() and "two tasks or more" in capsys.readouterr().err
