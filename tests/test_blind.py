"""The blind comparison: what is counted, what is hidden, and what chance can do."""

import itertools
import math

import pytest

from utils.blind import (
    BlindTest,
    agreement,
    chance_of,
    verdicts,
    wilson_interval,
)


def score_interval(wins, n, z=1.96):
    """The same interval, found by trying: where |wins/n - p| is z standard errors."""

    def off(p):
        return abs(wins / n - p) - z * math.sqrt(p * (1 - p) / n)

    ends = []
    for outer in (0.0, 1.0):
        inner = wins / n
        if inner == outer:
            ends.append(outer)
            continue
        for _ in range(100):
            middle = (outer + inner) / 2
            outer, inner = (middle, inner) if off(middle) > 0 else (outer, middle)
        ends.append(inner)
    return tuple(ends)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 137])
def test_wilsons_interval_solves_the_score_equation(n):
    for wins in range(n + 1):
        found = wilson_interval(wins, n)
        assert found == pytest.approx(score_interval(wins, n), abs=1e-9)
        assert 0 <= found[0] <= wins / n <= found[1] <= 1


def test_wilsons_interval_as_it_is_published():
    """Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3."""
    for (wins, n), ends in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(wins, n, z=1.959964) == pytest.approx(ends, abs=5e-5)


@pytest.mark.parametrize("n", range(1, 11))
def test_the_chance_is_counted_over_all_series_of_coins(n):
    heads = [sum(series) for series in itertools.product((0, 1), repeat=n)]
    for wins in range(n + 1):
        far = [k for k in heads if abs(k - n / 2) >= abs(wins - n / 2)]
        assert chance_of(wins, n) == len(far) / len(heads)


def test_seventy_per_cent_of_twenty_is_not_enough():
    assert chance_of(14, 20) == pytest.approx(0.11532, abs=5e-6)
    assert chance_of(15, 20) == pytest.approx(0.04139, abs=5e-6)
    assert chance_of(10, 20) == 1


@pytest.mark.parametrize("count", [wilson_interval, chance_of])
def test_what_cannot_be_counted_is_named(count):
    with pytest.raises(ValueError, match="at least, got n = 0"):
        count(0, 0)
    for wins in (-1, 4):
        with pytest.raises(ValueError, match=rf"from 0 to n \(3\), got {wins}"):
            count(wins, 3)


PAIRS = [
    {"prompt": f"p{i}", "before": f" old {i}", "after": f" new {i}"} for i in range(30)
]


def take_all(test, wanted):
    """Click through; `wanted` says of two texts which, and what was shown is kept."""
    shown = []
    while not test.done:
        _, left, right = test.shown()
        shown.append((left, right))
        test.choose("left" if wanted(left, right) == left else "right")
    return shown


def test_what_was_chosen_is_what_stood_on_that_side():
    test = BlindTest(PAIRS, seed=0)
    assert len(test) == 20
    take_all(test, lambda left, right: left if "new" in left else right)
    assert test.result() == ["after"] * 20
    test = BlindTest(PAIRS, seed=0)
    take_all(test, lambda left, right: left if "old" in left else right)
    assert test.result() == ["before"] * 20


def test_the_sides_say_nothing_and_neither_does_the_order():
    """Balanced within a test, in a random order, and another for another seed."""
    orders, places = set(), set()
    for seed in range(50):
        test = BlindTest(PAIRS, seed)
        shown = take_all(test, lambda left, right: left)
        sides = tuple("new" in left for left, _ in shown)
        assert sum(sides) == 10
        assert test.result() == [("before", "after")[side] for side in sides]
        orders.add(sides)
        places.add(tuple(pair["prompt"] for pair in test.pairs))
    assert len(orders) == len(places) == 50
    first = [order[0] for order in orders]
    assert 10 < sum(first) < 40


def test_equal_texts_are_left_out():
    same = {"prompt": "p", "before": " x", "after": " x"}
    assert len(BlindTest([same, PAIRS[0], same], seed=0)) == 1
    with pytest.raises(ValueError, match="all 2 pairs have the same text twice"):
        BlindTest([same, same], seed=0)


def test_nobody_looks_before_the_end_and_undo_takes_one_back():
    test = BlindTest(PAIRS, seed=0, most=2)
    with pytest.raises(ValueError, match="side must be left or right, got 'up'"):
        test.choose("up")
    test.choose("left")
    with pytest.raises(ValueError, match="1 of 2 pairs are done"):
        test.result()
    test.choose("left")
    first = test.result()
    with pytest.raises(ValueError, match="all 2 pairs are done"):
        test.choose("left")
    test.undo()
    test.choose("right")
    assert test.result()[0] == first[0] and test.result()[1] != first[1]
    test.undo(), test.undo(), test.undo()
    assert test.place == 0


def test_a_judge_prefers_the_text_that_it_marks_higher():
    pairs = [
        {"prompt": "a", "before": "b", "after": "bb"},
        {"prompt": "a", "before": "bbb", "after": "b"},
        {"prompt": "a", "before": "b", "after": "c"},
    ]
    assert verdicts(pairs, lambda texts: list(map(len, texts))) == [
        "after",
        "before",
        None,
    ]
    seen = verdicts(pairs, lambda texts: ["abb" in text for text in texts])
    assert seen == ["after", "before", None]


def test_who_saw_no_difference_neither_agrees_nor_disagrees():
    mine = ["after", "after", "before", "before"]
    assert agreement(mine, ["after", None, "after", "before"]) == (2, 3)
    assert agreement(mine, [None] * 4) == (0, 0)
