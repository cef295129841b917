"""Against `fake_hub`, the hub's HTTP API on loopback: nothing here asks the network."""

import socket
import time

import pytest
import tiny
import torch
from fake_hub import TOKEN, FakeHub
from test_compare import task

import rmt
from rmt.cli import main
from rmt.config import MaskConfig, RunConfig, UserError
from rmt.hub_id import is_id, split_id

hub_package = pytest.importorskip("huggingface_hub", reason="the hub needs the package huggingface_hub")
from rmt.hub import HubTask, resolve  # noqa: E402


def point(monkeypatch, url):
    monkeypatch.setattr(hub_package.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        hub_package.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Nobody's token, and a cache of its own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub_package.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(hub_package.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Xet, the newer way of uploading, is native code with a protocol of its own; without it LFS is used, over HTTP.
    monkeypatch.setattr(hub_package.constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    made = FakeHub()
    point(monkeypatch, made.url)
    yield made
    made.close()


@pytest.fixture
def pushed(hub, tmp_path):
    """A task on the hub as me/digits; returns its local folder's task."""
    made = task(tmp_path / "digits", range(100))
    HubTask.of(made.path.parent).push_to_hub("me/digits", token=TOKEN)
    return made


def kept_files(cache):
    """What lies in the cache: blobs, whole or not, and the names that point to them."""
    files = [p for p in cache.rglob("*") if p.is_file() and not {".locks", ".no_exist"} & set(p.parts)]
    return sorted(p.name for p in files if p.parent.name == "blobs" or p.name == "mask.safetensors")


def test_what_is_pushed_comes_back_byte_for_byte(hub, pushed, cache, tmp_path):
    commits = hub.repos["me/digits"]["commits"]
    content = commits[hub.repos["me/digits"]["refs"]["main"]]
    folder = pushed.path.parent
    for name in ("mask.safetensors", "README.md"):
        assert content[name] == (folder / name).read_bytes()
    assert set(content) == {"mask.safetensors", "README.md", ".gitattributes"} and len(commits) == 2
    assert len(hub.objects) == 1, "the mask is an LFS object, the card is not"
    path = resolve("me/digits")
    assert path.read_bytes() == pushed.path.read_bytes() and cache in path.parents
    again = HubTask.from_pretrained("me/digits")
    again.save_pretrained(tmp_path / "again")
    for name in ("mask.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["README.md", "mask.safetensors"]


def test_the_card_is_one_that_the_hub_takes(pushed):
    data = hub_package.ModelCard.load(pushed.path.parent / "README.md").data.to_dict()
    assert data["library_name"] == "rmt" and {"clip", "mask-tuning"} <= set(data["tags"])
    assert pushed.bits_sha256 in (pushed.path.parent / "README.md").read_text()


def test_a_models_masks_go_out_and_come_back(hub, cache):
    model = rmt.get_mask_model(tiny.model(), MaskConfig())
    with torch.no_grad():
        for mask in model.masks:
            mask.scores[torch.rand(mask.scores.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = 0
    config = RunConfig(model="local-dir:x", data="secret")
    about = {"classnames": ("a", "b"), "template": "a {}.", "config": config, "numbers": {"top-1, %": 91.25}}
    address = model.push_to_hub("me/model", **about, private=True, token=TOKEN)
    assert address.startswith(hub.url) and hub.repos["me/model"]["private"]
    readme = hub.repos["me/model"]["commits"][hub.repos["me/model"]["refs"]["main"]]["README.md"]
    assert b"91.25" in readme and b"secret" not in readme
    back = rmt.MaskModel.from_pretrained(tiny.model(), "me/model", token=TOKEN)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(model.masks, back.masks))
    with pytest.raises(UserError, match="is for another model"):
        rmt.MaskModel.from_pretrained(tiny.model(seed=1), "me/model", token=TOKEN)
    with pytest.raises(UserError, match="no such repository, or none that you may see"):
        rmt.MaskModel.from_pretrained(tiny.model(), "me/model", token=False, cache_dir=cache / "other")


def test_revisions_are_told_apart(hub, pushed, tmp_path):
    first = hub.repos["me/digits"]["refs"]["main"]
    other = task(tmp_path / "other", range(7))
    HubTask.of(other.path).push_to_hub("me/digits", token=TOKEN, commit_message="seven")
    assert resolve("me/digits").read_bytes() == other.path.read_bytes()
    assert resolve("me/digits", revision=first).read_bytes() == pushed.path.read_bytes()
    for name in (f"me/digits@{first}", f"hf-hub:me/digits@{first}"):
        assert resolve(name).read_bytes() == pushed.path.read_bytes()
    with pytest.raises(UserError, match="has no such revision"):
        resolve("me/digits@v9")
    with pytest.raises(UserError, match="one revision is expected"):
        resolve("me/digits@v9", revision="v8")
    with pytest.raises(UserError, match="has no such revision"):
        HubTask.of(other.path).push_to_hub("me/digits", token=TOKEN, branch="nowhere")


def test_a_local_path_wins_and_asks_nobody(hub, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    task(tmp_path / "me" / "digits", range(3))
    hub.log.clear()
    assert resolve("me/digits").resolve() == tmp_path / "me" / "digits" and not hub.log


def test_without_a_network_the_cache_serves_and_nothing_else_does(hub, pushed, cache, monkeypatch):
    path = resolve("me/digits")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    point(monkeypatch, nowhere)
    assert resolve("me/digits", local_files_only=True) == path == resolve("me/digits")
    before = kept_files(cache)
    for call in (lambda: resolve("me/new"), lambda: resolve("me/new", local_files_only=True),
                 lambda: HubTask.from_pretrained("me/new")):  # fmt: skip
        with pytest.raises(UserError, match="as a hub id it is not in the local cache, and the hub cannot be reached"):
            call()
    with pytest.raises(UserError, match="the hub has failed for me/new"):
        HubTask.of(pushed.path).push_to_hub("me/new", token=TOKEN)
    assert kept_files(cache) == before


@pytest.mark.parametrize("broken, told", [("truncated", "the hub has failed for"), ("flipped", "must have the hash")])
def test_a_bad_download_leaves_nothing_behind(hub, pushed, cache, broken, told):
    hub.broken = broken
    with pytest.raises(UserError, match=told):
        resolve("me/digits")
    assert kept_files(cache) == []
    hub.broken = None
    assert resolve("me/digits").read_bytes() == pushed.path.read_bytes()


def test_a_file_that_is_damaged_on_the_hub_is_refused(hub, pushed, cache):
    data = bytearray(pushed.path.read_bytes())
    data[-5] ^= 1
    hub.commit("me/damaged", {"mask.safetensors": bytes(data)})
    with pytest.raises(UserError, match="is damaged"):
        rmt.MaskModel.from_pretrained(tiny.model(), "me/damaged")
    hub.commit("me/text", {"README.md": b"hello"})
    with pytest.raises(UserError, match=r"me/text is no task: it has no mask.safetensors"):
        resolve("me/text")


def test_missing_repositories_bad_tokens_and_wrong_ids_are_user_errors(hub, pushed, cache):
    for token in (TOKEN, False):
        with pytest.raises(UserError, match="nothing is at me/none, and the hub has no such repository"):
            resolve("me/none", token=token)
    for name in ("just-a-name", "a/b/c", "/abs/none", "a//b", "-a/b", "a/b.", "a/b..c", "a b/c", "a/b@", "../x"):
        with pytest.raises(UserError, match=r"expected a task folder, its mask.safetensors, or the id user/name"):
            resolve(name)
        with pytest.raises(UserError, match="expected a task folder"):
            HubTask.of(pushed.path).push_to_hub(name, token=TOKEN)
    before = {name: dict(entry["refs"]) for name, entry in hub.repos.items()}
    for repo, token in (("me/digits", "hf_bad"), ("others/digits", TOKEN)):
        with pytest.raises(UserError, match=f"the hub has failed for {repo}|no such repository"):
            HubTask.of(pushed.path).push_to_hub(repo, token=token)
    hub.broken = "down"
    with pytest.raises(UserError, match=r"the hub has failed for me/digits|cannot be reached"):
        HubTask.of(pushed.path).push_to_hub("me/digits", token=TOKEN)
    assert {name: entry["refs"] for name, entry in hub.repos.items()} == before
    with pytest.raises(UserError, match="takes user/name, and the option branch"):
        HubTask.of(pushed.path).push_to_hub("me/digits@v1", token=TOKEN)


def test_the_readme_of_something_else_is_not_pushed(tmp_path):
    made = task(tmp_path / "a", range(9))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mask.safetensors").write_bytes(made.path.read_bytes())
    (tmp_path / "b" / "README.md").write_text("my private project")
    files = HubTask.of(tmp_path / "b" / "mask.safetensors").files
    assert files["README.md"] == (tmp_path / "a" / "README.md").read_bytes()
    assert HubTask.of(made).files == HubTask.of(tmp_path / "a").files
    assert b"| acc | 12.50 |" in HubTask.of(tmp_path / "a", {"acc": 12.5}).files["README.md"]


def test_commands_push_and_read_ids(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = task(tmp_path / "a", range(100))
    assert main(["push", str(tmp_path / "a"), "me/a", "--private"]) == 0
    assert f"{hub.url}/me/a" in capsys.readouterr().out and hub.repos["me/a"]["private"]
    assert main(["inspect", "me/a"]) == 0
    assert made.bits_sha256 in capsys.readouterr().out
    assert main(["diff", "me/a", str(tmp_path / "a")]) == 0
    assert main(["inspect", "me/b"]) == 2
    assert "no such repository" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "none"), "me/b"]) == 2 and "me/b" not in hub.repos


def test_ids():
    assert split_id("a/b") == ("a/b", None)
    assert split_id("hf-hub:u_1/n.a-me@refs/pr/1") == ("u_1/n.a-me", "refs/pr/1")
    assert not any(map(is_id, ("runs", "a/b/c", "./a", "/a/b", "a/", "a/b@", "a\\b", "ä/b")))
