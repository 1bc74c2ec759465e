"""The labeller: what it asks, what it writes, and where it goes on."""

import math
import random

import pytest

from utils.labelling import (
    Labeller,
    Question,
    answer_of,
    describe,
    labelling_box,
    make_questions,
)
from utils.preferences import read_pairs

PAIRS = [(f"film {i} is", f" good {i} .", f" bad {i} .") for i in range(45)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.jsonl"


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_every_tenth_question_is_an_earlier_one_with_its_sides_swapped():
    questions = make_questions(PAIRS, seed=3)
    assert [i for i, q in enumerate(questions) if q.again] == [9, 19, 29, 39, 49]
    first = [q for q in questions if not q.again]
    assert [q.prompt for q in first] == [prompt for prompt, _, _ in PAIRS]
    for i in (9, 19, 29, 39, 49):
        twin = Question(questions[i].prompt, questions[i].right, questions[i].left)
        assert twin in questions[:i]
    assert len({q.key for q in questions}) == 50


def test_no_question_is_repeated_at_once_or_twice():
    for seed in range(20):
        questions = make_questions(PAIRS, seed, every=3)
        asked = [q.key[:2] for q in questions]
        assert not any(a == b for a, b in zip(asked, asked[1:], strict=False))
        assert len({q.key for q in questions}) == len(questions) > 60


def test_the_sides_are_shuffled_and_a_seed_repeats_them():
    questions = make_questions(PAIRS * 1, seed=3)
    good = sum("good" in q.left for q in questions if not q.again)
    assert 10 < good < 35
    assert make_questions(PAIRS, seed=3) == questions != make_questions(PAIRS, seed=4)


@pytest.mark.parametrize(
    "pairs, says",
    [
        ([("a", "b", "b")], "responses to 'a' are both 'b'"),
        ([("a", "b", "c"), ("a", "c", "b")], "for 'a' comes twice"),
    ],
)
def test_pairs_that_cannot_be_asked_are_named(pairs, says):
    with pytest.raises(ValueError, match=says):
        make_questions(pairs, seed=0)


def test_each_answer_is_on_disk_before_the_next_question(path):
    labeller = Labeller(make_questions(PAIRS[:9], seed=0), path)
    again = path.with_name("mine.again.jsonl")
    asked = []
    while question := labeller.question:
        asked.append(question)
        labeller.answer("2")
        assert lines(path) + lines(again) == len(asked) == labeller.done
    pairs, faults = read_pairs(path)
    assert not faults and lines(again) == 1
    once = [q for q in asked if not q.again]
    assert [p["chosen"] for p in pairs] == [q.right for q in once]
    assert [p["rejected"] for p in pairs] == [q.left for q in once]
    with pytest.raises(ValueError, match="all 10 questions are answered"):
        labeller.answer("1")


def test_labelling_goes_on_where_it_stopped(path):
    """At every place: answers, repeats and skips are there again, and the next."""
    questions, keys = make_questions(PAIRS[:18], seed=5), "12s112s21221s1121212"
    labeller = Labeller(questions, path)
    while labeller.question:
        labeller.answer(keys[labeller.done])
        later = Labeller(questions, path)
        assert later.question == labeller.question and later.done == labeller.done
        assert later.answers == labeller.answers and not later.faults
        assert later.report() == pytest.approx(labeller.report(), nan_ok=True)


def test_a_kill_within_an_answer_costs_that_answer_only(path):
    questions = make_questions(PAIRS[:5], seed=0)
    labeller = Labeller(questions, path)
    for _ in range(3):
        labeller.answer("1")
    path.write_bytes(path.read_bytes()[:-7])
    later = Labeller(questions, path)
    assert later.question == questions[2]
    later.answer("2")
    pairs, faults = read_pairs(path)
    assert [p["chosen"] for p in pairs][2] == questions[2].right and not faults


def test_undo_takes_the_last_answer_back_from_the_disk(path):
    questions = make_questions(PAIRS[:10], seed=0)
    labeller = Labeller(questions, path)
    kept = []
    for key in "1s2111111" + "2":  # the last one answers a repeat
        kept.append([file.read_bytes() for file in existing(labeller)])
        labeller.answer(key)
    assert questions[9].again
    for number in reversed(range(10)):
        labeller.answer("u")
        assert labeller.question == questions[number]
        found = [data for file in existing(labeller) if (data := file.read_bytes())]
        assert found == [data for data in kept[number] if data]
    with pytest.raises(ValueError, match="no answer to undo"):
        labeller.answer("u")


def existing(labeller):
    return [file for file in labeller.files.values() if file.exists()]


def test_undo_works_after_a_restart(path):
    questions = make_questions(PAIRS[:5], seed=0)
    first = Labeller(questions, path)
    first.answer("1")
    first.answer("s")
    second = Labeller(questions, path)
    second.answer("u")
    assert second.question == questions[1]
    second.answer("u")
    assert second.question == questions[0] and lines(path) == 0


def test_what_was_skipped_is_not_asked_again(path):
    questions = make_questions(PAIRS[:9], seed=0)
    (again,) = (q for q in questions if q.again)
    labeller, asked = Labeller(questions, path), []
    while question := labeller.question:
        asked.append(question)
        labeller.answer("s" if question.prompt == again.prompt else "1")
    assert again not in asked and len(asked) == 9
    assert labeller.report()["repeated"] == 0 and labeller.done == 10


def test_the_report_by_hand(path):
    """Ten pairs and a repeat: always the left side, so the other text the second time.

    Then somebody who always takes the good one, wherever it stands.
    """
    questions = make_questions(PAIRS[:10], seed=1)
    labeller = Labeller(questions, path)
    assert math.isnan(labeller.report()["left"])
    while labeller.question:
        labeller.answer("1")
    expected = {"answered": 11, "skipped": 0, "left": 1.0, "repeated": 1}
    assert labeller.report() == {**expected, "consistent": 0.0}
    wise = Labeller(questions, path.with_name("wise.jsonl"))
    while q := wise.question:
        wise.answer("1" if "good" in q.left else "2")
    left = sum("good" in q.left for q in questions) / 11
    report = wise.report()
    assert report == {**expected, "left": left, "consistent": 1.0}
    assert describe(report) == (
        f"11 answers, 0 skipped; the left one in {left:.0%}; of 1 asked twice, the "
        "same one was chosen in 100%"
    )


def test_another_key_is_named(path):
    labeller = Labeller(make_questions(PAIRS[:3], seed=0), path)
    with pytest.raises(ValueError, match="1, 2, s .skip. or u .undo., got '3'"):
        labeller.answer("3")
    assert not path.exists()


def test_a_broken_line_is_named_and_the_others_count(path):
    questions = make_questions(PAIRS[:4], seed=0)
    first = Labeller(questions, path)
    first.answer("1")
    with path.open("a") as file:
        file.write("{rubbish\n")
    first.answer("1")
    later = Labeller(questions, path)
    assert later.question == questions[2]
    assert later.faults == [f"{path}, line 2 is no JSON"]


def test_the_simulated_answers_are_as_frequent_as_bradley_and_terry_say():
    rng, n = random.Random(0), 20_000
    for left, right in ((0.0, 0.0), (3.0, 0.0), (0.5, 1.5)):
        p = 1 / (1 + math.exp(right - left))
        share = sum(answer_of(left, right, rng) == "1" for _ in range(n)) / n
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert answer_of(800.0, 0.0, rng) == "1" and answer_of(0.0, 800.0, rng) == "2"


def test_the_box_takes_clicks_and_keys_and_shows_texts_as_they_are(path):
    """Without a browser: what the widgets' own events call."""
    pairs = [("is <i>it</i>", f" a < {i}", f" b & {i}") for i in range(12)]
    labeller = Labeller(make_questions(pairs, seed=0), path)
    box = labelling_box(labeller)
    prompt, sides, buttons, field, bar, status = box.children
    first = labeller.question
    shown = prompt.value + "".join(side.value for side in sides.children)
    assert "&lt;i&gt;it&lt;/i&gt;" in shown and "<i>it" not in shown
    assert "<b> a &lt; " in shown and "<b> b &amp; " in shown
    buttons.children[1].click()
    assert labeller.answers[first.key] == first.right and bar.value == 1
    field.value = "1"
    assert labeller.done == 2 and field.value == ""
    for key in "S?u":
        field.value = key
        assert field.value == ""
    assert labeller.done == 2 and "2 of 13" in status.value
    field.value = "x"
    assert "got &#x27;x&#x27;" in status.value
    while labeller.question:
        buttons.children[0].click()
    assert "All questions are answered" in prompt.value and bar.value == bar.max
    assert [b.disabled for b in buttons.children] == [True, True, True, False]
    buttons.children[3].click()
    assert labeller.done == 12 and not buttons.children[0].disabled
