"""Before bench/train_step.py times a step: do all variants reach the same scores?

The judge is the official step in fp32 (teacher without a graph: the same numbers), from the same first scores, on the
same batches, with the same draws. Two steps; the second sees flipped bits and Adam's moments.

In fp32 a score must be within CLOSE of the judge's, relatively, and its bit the same, but where
    a draw is undecided     P and U are so close that rounding decides which is larger (`undecided`)
    a score is a tie        within CLOSE, yet on the other side of the threshold
    Adam magnifies          other kernels sum a product in another order; a gradient near 0 then changes by much of
                            itself, and Adam, which divides by its size, makes a step of another length of it
All are counted and bounded (measured: none apart in rmt, 2e-4 to 5e-4 under torch.compile; 4e-2 and more where the
strength, the temperature or the L2 term was another).
After each step those scores and their moments are set to the judge's, so that the next one is judged alone. In bf16 and
tf32 rounding reaches every gradient: there the direction of the whole change is compared, which shows a broken step but
not a subtle one; so the bench checks the same variants in fp32 before.
"""

import dataclasses

import official
import torch
from step_variants import Official, Problem, Variant, runs_in
from torch import Tensor

CLOSE = 1e-6
# Shares of all scores, beside ALLOWANCE of them, that tiny models need.
UNDECIDED, TIES, MAGNIFIED, ALLOWANCE = 1e-5, 1e-6, 2e-3, 16
# What rounding may do to the change of all scores: the cosine with the judge's.
COSINE = {"fp32": 0.9999, "tf32": 0.98, "bf16": 0.9}
STEPS = 2


class NotEqual(Exception):
    """A variant that computes something else. It is not timed."""


@dataclasses.dataclass
class Judged:
    """The judge's state after a step, and where a draw of that step was undecided. (N, K) each, on the CPU."""

    scores: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    undecided: list[Tensor]


@dataclasses.dataclass
class Verdict:
    """Counts over both steps, out of `total` scores a step; the cosine of the change of all scores, the smaller one."""

    total: int
    undecided: int = 0
    ties: int = 0
    apart: int = 0
    cosine: float = 1.0

    def __str__(self) -> str:
        return (
            f"{self.apart / (STEPS * self.total):.1e} of the scores apart, {self.undecided} undecided draws, "
            f"{self.ties} ties, cosine of the change {self.cosine:.6f}"
        )


def undecided(a: Tensor, b: Tensor, uniform: Tensor) -> Tensor:
    """Where P and U are so close that rounding decides which is larger.

    P takes four roundings of 2^-24, as coarse as U's own grid; the L2 term in `a` is off by one of 1.3e-7.
    """
    p = (torch.sign(a) * (a + b) / (a.abs() + b.abs() + official.EPS) + 1) / 2
    return (p - uniform).abs() <= 2**-22 + 1.6e-14 / (a.abs() + b.abs() + official.EPS)


def judge(problem: Problem, usual: bool) -> list[Judged]:
    """STEPS steps of the official code in fp32."""
    variant, done = Official(problem, "fp32", usual, kind=_Recording, teacher_graph=False), []
    for step in range(STEPS):
        variant.run(*problem.batches[step], problem.uniforms(step))
        state = [[t.cpu().clone() for t in column] for column in zip(*variant.state())]
        done.append(Judged(*state, [where.flatten(1).cpu() for where in variant.tuner.near]))
    return done


class _Recording(official.Tuner):
    """Keeps where the last step's draws were undecided."""

    def update(self, kept: list[Tensor], uniforms: list[Tensor]) -> None:
        self.near = [undecided(m.grad, b, u) for m, b, u in zip(self.scores.values(), kept, uniforms)]
        super().update(kept, uniforms)


def check(problem: Problem, name: str, variant: Variant, judged: list[Judged], usual: bool = True) -> Verdict:
    """Takes STEPS steps of `variant`. Raises NotEqual where its scores are not the judge's."""
    precision = runs_in(problem.setup, name)
    verdict = Verdict(sum(s.numel() for s in judged[0].scores))
    before = [s.flatten(1).cpu() for s in problem.scores(usual).values()]
    for step, want in enumerate(judged):
        variant.run(*problem.batches[step], problem.uniforms(step))
        change, moved, wanted = 0.0, 0.0, 0.0
        for i, state in enumerate(variant.state()):
            got = state[0].cpu()
            if not got.isfinite().all():
                raise NotEqual(f"{name}: step {step + 1} made scores that are not finite")
            ours, theirs = (t.double() - before[i].double() for t in (got, want.scores[i]))
            change, moved, wanted = (
                total + float((u * v).sum())
                for total, u, v in ((change, ours, theirs), (moved, ours, ours), (wanted, theirs, theirs))
            )
            settled = _count(verdict, got, want, i)
            if precision == "fp32":
                settle(state, (want.scores[i], want.exp_avg[i], want.exp_avg_sq[i]), settled)
        verdict.cosine = min(verdict.cosine, change / max(moved * wanted, 1e-300) ** 0.5)
        if precision == "fp32":
            before = want.scores
    _decide(name, verdict, precision)
    return verdict


def _count(verdict: Verdict, got: Tensor, want: Judged, i: int) -> Tensor:
    """Adds one mask's counts to the verdict; returns where its scores are to be set to the judge's."""
    scores, open_ = want.scores[i], want.undecided[i]
    apart = (got - scores).abs() > CLOSE * scores.abs()
    other = (got > official.THRESHOLD) != (scores > official.THRESHOLD)
    verdict.undecided += int(open_.sum())
    verdict.ties += int((other & ~apart & ~open_).sum())
    verdict.apart += int((apart & ~open_).sum())
    return apart | other | open_


def settle(state: tuple[Tensor, ...], wanted: tuple[Tensor, ...], where: Tensor) -> None:
    """Sets scores and both moments to the judge's at single elements."""
    if where.any():
        where = where.to(state[0].device)
        for mine, theirs in zip(state, wanted):
            mine[where] = theirs.to(mine.device)[where]


def _decide(name: str, verdict: Verdict, precision: str) -> None:
    scores = STEPS * verdict.total
    counts = {"undecided": UNDECIDED, "ties": TIES, "apart": MAGNIFIED} if precision == "fp32" else {}
    bounds = {what: (getattr(verdict, what), "<=", share * scores + ALLOWANCE) for what, share in counts.items()}
    bounds["cosine of the change"] = verdict.cosine, ">=", COSINE[precision]
    for what, (value, sign, bound) in bounds.items():
        if not (value >= bound if sign == ">=" else value <= bound):
            raise NotEqual(
                f"{name} ({precision}) does not reach the scores of the official step: {what} {value:.6g}, expected "
                f"{sign} {bound:.6g}; {verdict}. Nothing is timed."
            )
