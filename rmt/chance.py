"""Whether two masks overlap more than chance would have them: the upper tail of the hypergeometric distribution.

Of n weights a task has switched off a, another b. Had each drawn its own at random, `both` would be hypergeometric with
mean a b / n. One layer's tail is summed term by term, from exact log-gamma values. A model's total is a sum of
independent layers; its tail is a saddlepoint approximation (Lugannani and Rice 1980, with Daniels' 1987 correction for
lattices), which keeps its relative accuracy where a normal approximation is off by hundreds of decades.
"""

import math
from collections.abc import Sequence

import numpy as np

Layer = tuple[int, int, int]
_LN10 = math.log(10)


def log10_at_least(n: int, a: int, b: int, both: int) -> float:
    """log10 P(X >= both), X hypergeometric: b drawn of n, a of which are marked. 0.0 where that is certain, -inf never.

    Raises: ValueError unless 0 <= a, b <= n.
    """
    if not 0 <= min(a, b) <= max(a, b) <= n:
        raise ValueError(f"need 0 <= a, b <= n, got n={n}, a={a}, b={b}")
    low, high = max(0, a + b - n), min(a, b)
    if both <= low:
        return 0.0
    if both > high:
        return -math.inf
    if both > _mode(n, a, b, 1.0):
        return min(0.0, _tail(n, a, b, both) / _LN10)
    # The short side is summed, the long one is what it leaves: P(X < both) in terms of the unmarked, a - X.
    return math.log1p(-min(1.0, math.exp(_tail(n, a, n - b, a - both + 1)))) / _LN10 if both > low else 0.0


def _tail(n: int, a: int, b: int, k: int) -> float:
    """ln P(X >= k) for k at the mode or above: terms fall, each faster than the one before."""
    first, ratio = _log_pmf(n, a, b, k), (a - k) * (b - k) / ((k + 1) * (n - a - b + k + 1))
    terms = min(a, b) - k
    if 0 < ratio < 1:
        terms = min(terms, math.ceil(45 / -math.log(ratio)))
    j = np.arange(k, k + min(terms, 50 + round(15 * math.sqrt(_variance(n, a, b)))), dtype=np.float64)
    with np.errstate(divide="ignore"):
        logs = np.cumsum(np.log(a - j) + np.log(b - j) - np.log(j + 1) - np.log(n - a - b + j + 1))
    return first + math.log1p(float(np.exp(logs).sum()))


def _log_pmf(n: int, a: int, b: int, k: int) -> float:
    return _choose(a, k) + _choose(n - a, b - k) - _choose(n, b)


def _choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _variance(n: int, a: int, b: int) -> float:
    return a * b * (n - a) * (n - b) / (n * n * (n - 1)) if n > 1 else 0.0


def _mode(n: int, a: int, b: int, odds: float) -> int:
    """Of the distribution whose terms are weighted by odds ** k (Fisher's noncentral one); 1.0: of the plain one."""
    # Where the ratio of neighbours is 1: (a - k + 1)(b - k + 1) odds = k (n - a - b + k).
    p, q, r = 1 - odds, n - a - b + odds * (a + b + 2), -odds * (a + 1) * (b + 1)
    # The form of the root that subtracts no near-equal numbers.
    k = -2 * r / (q + math.sqrt(max(0.0, q * q - 4 * p * r)))
    return min(max(math.floor(k), max(0, a + b - n)), min(a, b))


def log10_sum_at_least(layers: Sequence[Layer], both: int) -> float:
    """log10 P(sum of X_l >= both) for independent X_l, each of a layer (n, a, b).

    One layer that can vary: exact. Several: the saddlepoint approximation, within 0.05 of the exact convolution's
    log10 in the tests (12 % of p, worst at the end of the range), down to p = 1e-290.
    """
    fixed = sum(max(0, a + b - n) for n, a, b in layers)
    free = [(n, a, b) for n, a, b in layers if max(0, a + b - n) < min(a, b)]
    low, high = fixed, fixed + sum(min(a, b) - max(0, a + b - n) for n, a, b in free)
    if both <= low:
        return 0.0
    if both > high:
        return -math.inf
    if len(free) == 1:
        (n, a, b), known = free[0], fixed - max(0, free[0][1] + free[0][2] - free[0][0])
        return log10_at_least(n, a, b, both - known)
    # Layers without freedom add what they must.
    known = fixed - sum(max(0, a + b - n) for n, a, b in free)
    target = both - known
    if both == high:
        return sum(_log_pmf(n, a, b, min(a, b)) for n, a, b in free) / _LN10
    return min(0.0, _saddlepoint(free, target) / _LN10)


def _saddlepoint(layers: Sequence[Layer], both: int) -> float:
    """ln of the tail, strictly inside the range of the sum."""
    t = _solve(layers, both)
    value, _, variance = _cumulants(layers, t)
    if abs(t) * math.sqrt(variance) < 0.02:
        # At the mean both terms of the formula have a pole, and digits are lost near it; the normal tail is good there.
        _, mean, variance = _cumulants(layers, 0.0)
        return _log_normal_tail((both - 0.5 - mean) / math.sqrt(variance))
    w = math.copysign(math.sqrt(max(0.0, 2 * (t * both - value))), t)
    u = -math.expm1(-t) * math.sqrt(variance)
    if t < 0:
        # The long side, as what the short one leaves.
        below = math.exp(-w * w / 2) / math.sqrt(2 * math.pi) * (1 / w - 1 / u) + 0.5 * math.erfc(-w / math.sqrt(2))
        return math.log1p(-min(max(below, 0.0), 1 - 1e-16))
    # ln(Q(w) + phi(w) (1 / u - 1 / w)), with phi(w) taken out: it underflows long before its logarithm does.
    mills = math.exp(_log_normal_tail(w) + w * w / 2 + 0.5 * math.log(2 * math.pi))
    return -w * w / 2 - 0.5 * math.log(2 * math.pi) + math.log(mills + 1 / u - 1 / w)


def _log_normal_tail(z: float) -> float:
    """ln P(Z >= z)."""
    if z < 25:
        return math.log(0.5 * math.erfc(z / math.sqrt(2)))
    squared = 1 / (z * z)
    series = math.log1p(-squared * (1 - 3 * squared * (1 - 5 * squared * (1 - 7 * squared))))
    return -z * z / 2 - math.log(z) - 0.5 * math.log(2 * math.pi) + series


def _solve(layers: Sequence[Layer], both: int) -> float:
    """The tilt t under which the sum's mean is `both`: Newton's steps, kept between what is known to enclose it."""
    low, high, t = -math.inf, math.inf, 0.0
    for _ in range(200):
        _, mean, variance = _cumulants(layers, t)
        low, high = (t, high) if mean < both else (low, t)
        if abs(mean - both) < 1e-10 * max(1.0, both):
            break
        step = t + min(max((both - mean) / variance, -4.0), 4.0) if variance > 0 else t + math.copysign(1, both - mean)
        t = step if low < step < high else (low + high) / 2
    return t


def _cumulants(layers: Sequence[Layer], t: float) -> tuple[float, float, float]:
    """The sum's cumulant generating function at t, and its first two derivatives."""
    value = mean = variance = 0.0
    for n, a, b in layers:
        middle = _mode(n, a, b, math.exp(t))
        reach = 60 + round(15 * math.sqrt(max(1.0, n / 16 if n < 64 else min(a, b, n - a, n - b, n / 16))))
        first, last = max(0, a + b - n, middle - reach), min(a, b, middle + reach)
        j = np.arange(first, last, dtype=np.float64)
        with np.errstate(divide="ignore"):
            steps = np.log(a - j) + np.log(b - j) - np.log(j + 1) - np.log(n - a - b + j + 1) + t
        logs = np.concatenate([[0.0], np.cumsum(steps)])
        top = logs.max()
        weights = np.exp(logs - top)
        total, k = weights.sum(), np.arange(len(weights))
        here = float(weights @ k / total)
        value += _log_pmf(n, a, b, first) + t * first + top + math.log(total)
        mean += first + here
        variance += float(weights @ (k - here) ** 2 / total)
    return value, mean, variance


def holm(log10_p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for as many tests as there are: log10 of adjusted p values, in the order given."""
    adjusted, running = [0.0] * len(log10_p), -math.inf
    for rank, index in enumerate(sorted(range(len(log10_p)), key=lambda i: log10_p[i])):
        running = max(running, min(0.0, log10_p[index] + math.log10(len(log10_p) - rank)))
        adjusted[index] = running
    return adjusted
