"""The processes of the tests of `rmt.world`: python world_tools.py FOLDER does what they all do, and writes what came.

One process imports everything and forks the ranks: torch alone takes longer to import than the tests to run. The test
that starts it holds their store, at a port that the system has picked.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rmt import clip
from rmt.config import MaskConfig, TrainConfig, UserError, from_yaml
from rmt.fully_sharded import fully_sharded
from rmt.masked import disabled, masks
from rmt.masking import apply_masks
from rmt.meet import joined
from rmt.optim import MaskAdam
from rmt.reduction import Reduction
from rmt.resume import Resume
from rmt.run import run
from rmt.select import select
from rmt.train import tune
from rmt.world import World

RANKS = 4
WAIT_S = 4
RATES = [4e-4] * 5
RECIPE = TrainConfig(lr=4e-4, strength=1.0, log_every=2)
TEXT = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=-1)
# name -> ranks, images of a batch, recipe, masks
STEPS = {
    "two": (2, 8, RECIPE, {}),
    "three, uneven": (3, 8, RECIPE, {}),
    "four": (4, 8, RECIPE, {}),
    "parts, uneven": (2, 7, replace(RECIPE, accumulate=3), {}),
    "one image has no part": (3, 7, replace(RECIPE, accumulate=3, shortcuts=False), {}),
    "all on at first": (2, 8, replace(RECIPE, lr=2e-3), {"on": True}),
    "selected": (2, 8, RECIPE, {"selected": True}),
    "a rival": (2, 8, replace(RECIPE, dropout="sign"), {}),
    "text tower": (2, 8, RECIPE, {"towers": ("image", "text")}),
    "bf16": (2, 8, RECIPE, {"reduce": "bf16"}),
    "zero, two": (2, 8, RECIPE, {"zero": True}),
    "zero, three, parts": (3, 8, replace(RECIPE, accumulate=2), {"zero": True}),
    "zero, four": (4, 8, RECIPE, {"zero": True}),
    "zero, all on at first": (2, 8, replace(RECIPE, lr=2e-3), {"zero": True, "on": True}),
    "zero, selected": (2, 8, RECIPE, {"zero": True, "selected": True}),
    "zero, a rival": (2, 8, replace(RECIPE, dropout="sign"), {"zero": True}),
    "zero, bf16": (2, 8, RECIPE, {"zero": True, "reduce": "bf16"}),
    "shard, two": (2, 8, RECIPE, {"shard": True}),
    "shard, three, parts": (3, 8, replace(RECIPE, accumulate=2), {"shard": True}),
    "shard, parts, uneven": (2, 7, replace(RECIPE, accumulate=3), {"shard": True}),
    "shard, four, 8 bits": (4, 8, replace(RECIPE, adam="8bit"), {"shard": True}),
    "shard, all on at first": (2, 8, replace(RECIPE, lr=2e-3), {"shard": True, "on": True}),
    "shard, a rival": (2, 8, replace(RECIPE, dropout="sign"), {"shard": True}),
    "shard, text tower": (2, 8, RECIPE, {"shard": True, "towers": ("image", "text")}),
    "shard, bf16": (2, 8, RECIPE, {"shard": True, "reduce": "bf16"}),
    "bf16 products": (2, 8, replace(RECIPE, precision="bf16"), {}),
    "shard, bf16 products": (2, 8, replace(RECIPE, precision="bf16"), {"shard": True}),
}


def batches(images, world):
    def batch(step):
        generator = torch.Generator().manual_seed(100 + step)
        label = torch.arange(images) % 4
        image = torch.randn(images, 3, 32, 32, generator=generator) * 0.5
        image[torch.arange(images), label % 3] += 1 + label[:, None, None] // 3
        mine = world.share(images)
        return image[mine], label[mine]

    return batch


def masked(on=False, selected=False, towers=("image",), **_):
    """A tiny model with masks of which two sevenths are off, or none."""
    model = tiny.model()
    config, chosen = MaskConfig(towers=towers), None
    if selected:
        chosen = select(model, [], criterion="magnitude", budget=0.3, config=config, loss=None)
    for mask in apply_masks(model, config, chosen):
        if not on:
            with torch.no_grad():
                draws = torch.rand(mask.scores.shape, generator=torch.Generator().manual_seed(3))
                mask.scores.copy_(1e-2 - 7e-3 * draws)
    return model


def scores(model):
    return torch.cat([mask.scores.detach().flatten() for mask in masks(model)])


def tuned(name, world=None, rates=None, **options):
    """Scores, logged rows and bytes sent after the steps of STEPS[name]; world None: alone."""
    _, images, config, how = STEPS[name]
    world, rows, model = world or World(), [], masked(**how)
    world.sent, world.reduce = 0, how.get("reduce", "fp32")
    world.zero, world.shard = how.get("zero", False), how.get("shard", False)
    rates = rates or [config.lr] * len(RATES)
    text = TEXT
    if "towers" in how:
        tokens = torch.randint(1, 49000, (4, 16), generator=torch.Generator().manual_seed(5))
        with torch.no_grad(), disabled(model):
            text = clip.Text(model, tokens, F.normalize(model.encode_text(tokens), dim=-1))
    tune(model, text, batches(images, world), rates, config, log=rows.append, world=world, total=images, **options)
    found, frozen = masks(model), {k: v for k, v in model.state_dict().items() if not k.endswith(("scores", "bits"))}
    before = masked(**how).state_dict()
    same = frozen.keys() <= before.keys() and all(torch.equal(before[name], tensor) for name, tensor in frozen.items())
    packed = all(torch.equal(mask.bits, mask.module._packed_bits(mask.prefix)) for mask in found)
    sizes, words = [mask.scores.numel() for mask in found], [mask.bits.numel() for mask in found]
    sent = world.sent
    return {
        "scores": scores(model),
        "rows": rows,
        "sent": sent,
        "sizes": sizes,
        "words": words,
        "packed": packed,
        "same": same,
    }


def resumed(folder, worlds):
    """Three steps on two ranks, the file of which two and three ranks go on from."""
    found = {}
    for name, ranks, count in (("before", 2, 3), ("two", 2, 5), ("three", 3, 5)):
        world = worlds[ranks]
        path = folder / ("last.pt" if ranks == 2 else "copy.pt")
        if name == "two" and world and world.first:
            (folder / "copy.pt").write_bytes(path.read_bytes())
        if world:
            resume = Resume(path, {"run": "a"}, 0, world)
            found[name] = {"done": resume.steps_done, **tuned("two", world, RATES[:count], resume=resume)}
        dist.barrier()
    return found


class Held:
    """In the place of a resume file: notes after each step how many scores and moments are in this process."""

    steps_done = 0

    def load(self, optimizer):
        return None

    def save(self, optimizer, step, logged, *, last):
        self.scores = [mask.scores.untyped_storage().nbytes() // 4 for mask in optimizer.masks]
        self.moments = [optimizer.state[mask.scores]["exp_avg"].numel() if optimizer.state[mask.scores] else 0
                        for mask in optimizer.masks]  # fmt: skip
        self.nan = [bool(mask.scores.isnan().any()) for mask in optimizer.masks]


def held(world):
    seen = Held()
    tuned("zero, four", world, RATES[:2], resume=seen)
    return vars(seen)


def shares(world):
    """Elements that this rank keeps of frozen weights, of scores and of kept masked weights, while all is sharded."""
    model = masked()
    whole = {name: p.numel() for name, p in model.named_parameters()}
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with fully_sharded(model, world) as rows:
        local = {name: getattr(p, "_local_tensor", p) for name, p in model.named_parameters()}
        stored = {name: p.untyped_storage().nbytes() // 4 for name, p in local.items()}
        found = {"stored": stored, "scores": [row.scores.numel() for row in rows.rows]}
        found["dense"] = sum(len(module._dense) for module in model.modules() if hasattr(module, "_dense"))
    found["same"] = all(torch.equal(kept[name], p) for name, p in model.named_parameters())
    return found | {"whole": whole}


def resharded(folder, worlds):
    """Three steps on two ranks, one on one, one on four, each from the last one's file; sharded, and not."""
    found = {}
    for how in ("two", "zero, two", "shard, two"):
        path = folder / f"resharded {how}.pt"
        for ranks, count in ((2, 3), (1, 4), (4, 5)):
            world = World() if ranks == 1 else worlds[ranks]
            if world and (ranks > 1 or worlds[RANKS].first):
                resume = Resume(path, {"run": "a"}, 0, world)
                done = {"done": resume.steps_done, **tuned(how, world, RATES[:count], resume=resume)}
                found[f"{how}, {ranks}"] = done | {"file": torch.load(path, weights_only=True) if world.first else {}}
            dist.barrier()
    return found


def failures(worlds, folder):
    """What each rank says of what only some of them have done wrong, and after how many seconds."""
    world, said = worlds[RANKS], {}

    def odd(fine, bad):
        return bad if world.rank in (1, 3) else fine

    def lost():
        raise UserError(f"no data on {world.rank}")

    def first():
        if world.first:
            raise UserError("a damaged file")
        raise AssertionError("no work for other ranks")

    for name, call in {
        "agree": lambda: world.agree(lambda: {"code": odd("a", "b"), "config": "c"}),
        "together": lambda: world.together(odd(lambda: 1, lost)),
        "first": lambda: world.from_first(first),
        "need": lambda: world.need(3, "images of a batch"),
        "apart": lambda: tuned_apart(world),
        "graph": lambda: tune(masked(), TEXT, None, [1.0], replace(RECIPE, graph=True), world=world),
        "NaN": lambda: tuned_on_nan(world),
        "NaN of an owner": lambda: tuned_while_an_owner_fails(world, "zero"),
        "NaN of rows": lambda: tuned_while_an_owner_fails(world, "shard"),
        # A group that has timed out, or lost a rank, is of no use any more: the last two have one each.
        "silence": lambda: time.sleep(1.5 * WAIT_S) if world.rank == 1 else world.sum([1.0]),
        "lost": lambda: tuned_while_one_ends(worlds["spare"], folder),
    }.items():
        start = time.monotonic()
        try:
            call()
            text = None
        except UserError as error:
            text = str(error)
        said[name] = [text, time.monotonic() - start]
    return said


def tuned_apart(world):
    """One rank draws with another seed."""
    tune(masked(), TEXT, batches(8, world), RATES[:2], RECIPE, seed=1 + (world.rank == 2), world=world, total=8)


def tuned_on_nan(world):
    """One rank's images are NaN."""

    def bad(step):
        image, label = batches(8, world)(step)
        return image * (float("nan") if world.rank == 3 else 1), label

    tune(masked(), TEXT, bad, RATES[:2], replace(RECIPE, log_every=1), world=world, total=8)


def tuned_while_an_owner_fails(world, layout):
    """The update of rank 2's masks, or rows, comes out as NaN."""

    def fail(*args, **kwargs):
        raise ValueError("scores became NaN")

    update = MaskAdam._update
    setattr(world, layout, True)
    MaskAdam._update = fail if world.rank == 2 else update
    try:
        tune(masked(), TEXT, batches(8, world), RATES[:2], RECIPE, world=world, total=8)
    finally:
        MaskAdam._update = update
        setattr(world, layout, False)


def tuned_while_one_ends(world, folder):
    """The last rank ends in the middle of the third step, its task gradients on their way."""
    if world.rank == RANKS - 1:
        end, calls = Reduction.end, []

        def last(self, arrived):
            calls.append(end(self, arrived))
            if len(calls) == 5:
                os._exit(0)

        Reduction.end = last
    resume = Resume(folder / "lost.pt", {}, 0, world)
    tune(masked(), TEXT, batches(8, world), RATES, RECIPE, world=world, total=8, resume=resume)


def rank_main(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    with joined("cpu", start=60, timeout=WAIT_S) as everyone:
        groups = {n: dist.new_group(list(range(n))) for n in (2, 3)}
        worlds = {n: World(rank, n, group=group) if rank < n else None for n, group in groups.items()}
        worlds |= {RANKS: everyone, "spare": World(rank, RANKS, group=dist.new_group())}
        found = {}
        for name, (ranks, *_) in STEPS.items():
            dist.barrier()  # in the first group: a rank without a part waits longer than WAIT_S where all is slow
            if worlds[ranks]:
                found[name] = tuned(name, worlds[ranks])
        found["resumed"] = resumed(folder, worlds)
        found["resharded"], found["held"] = resharded(folder, worlds), held(everyone)
        found["shares"], everyone.zero = shares(everyone), False
        for name in ("run", "run sharded") if worlds[2] else ():
            worlds[2].shard = name == "run sharded"
            with worlds[2].quiet():
                run(from_yaml((folder / "config.yaml").read_text()), folder / name, world=worlds[2])
        torch.save(found, folder / f"rank{rank}.pt")
        dist.barrier()
        (folder / f"said{rank}.json").write_text(json.dumps(failures(worlds, folder)))


def main(folder):
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank_main(rank, Path(folder))
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    main(sys.argv[1])
