"""Which of two texts is better? Compared without knowing who wrote which, and counted.

Sources: Wilson 1927, "Probable inference, the law of succession, and statistical
inference" (the interval); the test is the binomial distribution itself.
"""

import math
import random
from collections.abc import Callable

BEFORE, AFTER = "before", "after"


def wilson_interval(wins: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The win rates that `wins` out of `n` do not contradict, 95 % of the time.

    Those p for which |wins / n - p| <= z sqrt(p (1 - p) / n). Unlike mean ± z standard
    errors they stay between 0 and 1, and are no point at 0 or n wins. Raises ValueError
    unless 0 <= wins <= n and n is 1 or more.
    """
    _check(wins, n)
    p, shrink = wins / n, 1 + z**2 / n
    middle = (p + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At 0 or n wins an end is 0 or 1 exactly, but for rounding
    return max(0.0, middle - half), min(1.0, middle + half)


def chance_of(wins: int, n: int) -> float:
    """How often a fair coin is at least this far from n / 2, on either side.

    The exact two-sided binomial test of a win rate of one half: the sum of C(n, k) /
    2^n over all k with |k - n / 2| >= |wins - n / 2|. Raises ValueError unless
    0 <= wins <= n and n is 1 or more.
    """
    _check(wins, n)
    far = abs(2 * wins - n)
    return sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= far) / 2**n


def _check(wins, n):
    if n < 1 or not 0 <= wins <= n:
        raise ValueError(f"a win rate takes 0 to n wins of n > 0, got {wins} of {n}")


class BlindTest:
    """Pairs of texts, shuffled, sides hidden: choose, and then see whose they were.

    `pairs` are dicts with the texts `prompt`, `before` and `after`. Pairs of equal
    texts are left out, and of the others at most `most` taken, in a random order. The
    sides are balanced: each of the two stands as often on the left, up to one. Raises
    ValueError if no two texts differ.
    """

    def __init__(self, pairs: list[dict], seed: int, most: int = 20):
        rng = random.Random(seed)
        different = [pair for pair in pairs if pair[BEFORE] != pair[AFTER]]
        if not different:
            raise ValueError(
                f"all {len(pairs)} pairs have the same text twice; take other prompts, "
                "or another seed"
            )
        self.pairs = rng.sample(different, min(most, len(different)))
        sides = [(BEFORE, AFTER), (AFTER, BEFORE)] * len(self.pairs)
        self._sides = sides[: len(self.pairs)]
        rng.shuffle(self._sides)
        self._choices = []

    def __len__(self):
        return len(self.pairs)

    @property
    def place(self) -> int:
        """The number of the pair that waits for a choice, from 0 on."""
        return len(self._choices)

    @property
    def done(self) -> bool:
        """Whether every pair has been chosen from."""
        return self.place == len(self)

    def shown(self) -> tuple[str, str, str]:
        """Of the pair that waits: the prompt, the text on the left, that on the right.

        Raises ValueError if none waits.
        """
        if self.done:
            raise ValueError(f"all {len(self)} pairs are done; undo() takes one back")
        pair, (left, right) = self.pairs[self.place], self._sides[self.place]
        return pair["prompt"], pair[left], pair[right]

    def choose(self, side: str):
        """Take the text on this side, "left" or "right", of the pair that waits.

        Raises ValueError for another word, or if no pair waits.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side must be left or right, got {side!r}")
        self.shown()
        self._choices.append(self._sides[self.place][side == "right"])

    def undo(self):
        """Take the last choice back, if there is one."""
        self._choices = self._choices[:-1]

    def result(self) -> list[str]:
        """Whose text was chosen, "before" or "after", of each pair in their order.

        Raises ValueError before the last choice: whoever knows is not blind any more.
        """
        if not self.done:
            raise ValueError(
                f"{self.place} of {len(self)} pairs are done; choose from the others, "
                "then look"
            )
        return list(self._choices)


def verdicts(pairs: list[dict], judge: Callable) -> list[str | None]:
    """Which text of each pair a judge prefers, or None if it sees no difference.

    `judge` gives a number, or True and False, for each of a list of whole texts.
    """
    marks = [judge([p["prompt"] + p[side] for p in pairs]) for side in (BEFORE, AFTER)]
    return [
        None if old == new else AFTER if new > old else BEFORE
        for old, new in zip(*marks, strict=True)
    ]


def agreement(mine: list, theirs: list) -> tuple[int, int]:
    """How often two have chosen the same, and of how many pairs.

    Pairs in which one of them saw no difference (None) do not count.
    """
    both = [pair for pair in zip(mine, theirs, strict=True) if None not in pair]
    return sum(one == other for one, other in both), len(both)
