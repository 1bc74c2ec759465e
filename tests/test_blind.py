"""The blind comparison: what is counted, what is hidden, and what chance can do."""

import itertools
import math

import pytest

from more.blind import BlindTest, agreement, chance_of, verdicts, wilson_interval

PUBLISHED = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
PUBLISHED |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize("n", [1, 2, 5, 20, 137])
def test_wilsons_interval_ends_where_the_score_test_does(n):
    """And as in Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    for counts, ends in PUBLISHED.items():
        assert wilson_interval(*counts, z=1.959964) == pytest.approx(ends, abs=5e-5)
    for wins in range(n + 1):
        low, high = wilson_interval(wins, n)
        assert 0 <= low <= wins / n <= high <= 1 and low < high
        for p in (low, high):
            off = abs(wins / n - p) - 1.96 * math.sqrt(p * (1 - p) / n)
            assert p in (0, 1) and p == wins / n or off == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", range(1, 11))
def test_the_chance_is_counted_over_all_series_of_coins(n):
    heads = [sum(series) for series in itertools.product((0, 1), repeat=n)]
    for wins in range(n + 1):
        far = [k for k in heads if abs(k - n / 2) >= abs(wins - n / 2)]
        assert chance_of(wins, n) == len(far) / len(heads)
    # 70 per cent of twenty is not enough, 75 is
    for wins, chance in ((10, 1), (14, 0.11532), (15, 0.04139)):
        assert chance_of(wins, 20) == pytest.approx(chance, abs=5e-6)
    for count in (wilson_interval, chance_of):
        for wins, of in ((0, 0), (-1, n), (n + 1, n)):
            with pytest.raises(ValueError, match=f"of n > 0, got {wins} of {of}"):
                count(wins, of)


def pair(*texts):
    return dict(zip(("prompt", "before", "after"), texts, strict=True))


PAIRS = [pair(f"p{i}", f" old {i}", f" new {i}") for i in range(30)]
SAME = pair("p", " x", " x")


def test_what_was_chosen_stood_on_that_side_and_the_sides_say_nothing():
    """Balanced within a test, in a random order, and another for another seed."""
    orders, places = set(), set()
    for seed in range(50):
        for word, whose in (("old", "before"), ("new", "after")):
            test, sides = BlindTest(PAIRS, seed), []
            while not test.done:
                sides.append(word in test.shown()[1])
                test.choose("left" if sides[-1] else "right")
            assert test.result() == [whose] * 20 and sum(sides) == 10
        orders.add(tuple(sides))
        places.add(tuple(pair["prompt"] for pair in test.pairs))
    assert len(orders) == len(places) == 50
    assert 10 < sum(order[0] for order in orders) < 40


def test_nobody_looks_before_the_end_and_undo_takes_one_back():
    assert len(BlindTest([SAME, PAIRS[0], SAME], seed=0)) == 1
    test = BlindTest(PAIRS, seed=0, most=2)
    test.choose("left")
    for call, said in (
        (
            lambda: BlindTest([SAME, SAME], seed=0),
            "all 2 pairs have the same text twice",
        ),
        (lambda: test.choose("up"), "side must be left or right, got 'up'"),
        (test.result, "1 of 2 pairs are done"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    test.choose("left")
    first = test.result()
    with pytest.raises(ValueError, match="all 2 pairs are done"):
        test.choose("left")
    test.undo()
    test.choose("right")
    assert [x == y for x, y in zip(test.result(), first, strict=True)] == [True, False]


@pytest.mark.parametrize("judge", [len, lambda text: "abb" in text])
def test_a_judge_prefers_what_it_marks_higher_and_none_is_no_vote(judge):
    pairs = [pair("a", "b", "bb"), pair("a", "bbb", "b"), pair("a", "b", "c")]
    theirs = verdicts(pairs, lambda texts: list(map(judge, texts)))
    assert theirs == ["after", "before", None]
    assert agreement(["after", "after", "before"], theirs) == (1, 2)
    assert agreement([None] * 3, theirs) == (0, 0)
