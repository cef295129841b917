"""BLEU-1 to 4 and CIDEr-D of captions, as pycocoevalcap computes them, but for the tokenizer.

pycocoevalcap runs Stanford's PTB tokenizer in Java, and its download is 104 MB for that; `words` here is one line of
ours: so these numbers lie near published ones, and are not to be set beside them in a table. `bleu` and `cider` take
lists of words, and equal pycocoevalcap 1.2 on equal words.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from ..config import UserError

TOKENIZER = "rmt's own: lower case, letters and digits, inner apostrophes and hyphens kept; not PTB"
ORDERS, SIGMA = 4, 6.0

Words = Sequence[str]


def words(text: str) -> list[str]:
    """Lower-case words of letters and digits, apostrophes and hyphens inside them kept; all other marks are left out.

    PTB would split don't into do and n't.
    """
    return re.findall(r"\w+(?:['\u2019-]\w+)*", text.lower())


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and CIDEr of one caption for each image against all of its references.

    BLEU is from 0 to 1; CIDEr-D from 0 to 10. CIDEr's document frequencies are of these references: it is 0 for a
    single image, and comparable only between equal sets of images.

    Raises: UserError for different numbers of both, or an image without references.
    """
    if len(candidates) != len(references) or not candidates or not all(references):
        got = f"{len(candidates)} captions for {len(references)} images"
        raise UserError(f"every image must have a caption and at least one reference, got {got}")
    mine, theirs = [words(text) for text in candidates], [[words(text) for text in texts] for texts in references]
    return {f"BLEU-{n}": value for n, value in enumerate(bleu(mine, theirs), 1)} | {"CIDEr": cider(mine, theirs)}


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to 4 of the corpus (Papineni et al., 2002): clipped precisions, brevity against the closest reference.

    No smoothing: 0 from the first order without a match. pycocoevalcap then gives some 1e-4.
    """
    hits, totals, length, closest = [0] * ORDERS, [0] * ORDERS, 0, 0
    for mine, theirs in zip(candidates, references):
        length += len(mine)
        closest += min((abs(len(other) - len(mine)), len(other)) for other in theirs)[1]
        for n in range(ORDERS):
            most: Counter = Counter()
            for other in theirs:
                most |= _grams(other, n + 1)
            found = _grams(mine, n + 1)
            hits[n] += (found & most).total()
            totals[n] += found.total()
    brevity = 0.0 if not length else min(1.0, math.exp(1 - closest / length))
    precisions = [hit / total if total else 0.0 for hit, total in zip(hits, totals)]
    return [brevity * math.prod(precisions[: n + 1]) ** (1 / (n + 1)) for n in range(ORDERS)]


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D (Vedantam et al., 2015): clipped tf-idf cosines of n-grams, a Gaussian penalty on length, times 10.

    A mean over orders 1 to 4, over an image's references, over images.
    """
    seen: Counter = Counter()
    for theirs in references:
        seen.update({gram for other in theirs for gram in _all_grams(other)})
    images = math.log(len(references))

    def vector(caption: Words) -> list[dict[tuple, float]]:
        found: list[dict[tuple, float]] = [{} for _ in range(ORDERS)]
        for gram, count in _all_grams(caption).items():
            found[len(gram) - 1][gram] = count * (images - math.log(max(1, seen[gram])))
        return found

    def similarity(mine: Words, theirs: Words) -> float:
        total = 0.0
        for a, b in zip(vector(mine), vector(theirs)):
            norms = math.hypot(*a.values()) * math.hypot(*b.values())
            product = sum(min(weight, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, weight in a.items())
            total += product / norms if norms else 0.0
        # As the reference code counts length, by bigrams: it differs from words for an empty caption alone.
        gap = max(0, len(mine) - 1) - max(0, len(theirs) - 1)
        return total / ORDERS * math.exp(-(gap**2) / (2 * SIGMA**2))

    scores = (
        sum(similarity(mine, other) for other in theirs) / len(theirs) for mine, theirs in zip(candidates, references)
    )
    return 10 * sum(scores) / len(references)


def _grams(caption: Words, n: int) -> Counter:
    return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))


def _all_grams(caption: Words) -> Counter:
    return sum((_grams(caption, n) for n in range(1, ORDERS + 1)), Counter())
