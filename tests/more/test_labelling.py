"""The labeller: what it asks, what it writes, and where it goes on."""

import math
import random

import pytest

from more.labelling import Labeller, Question, describe, make_questions
from more.preferences import read_pairs
from more.widgets import labelling_box
from practice.cells import import_cells
from tests.conftest import refused
from utils.settings import NOTEBOOKS

PAIRS = [(f"film {i} is", f" good {i} .", f" bad {i} .") for i in range(45)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.jsonl"


def test_every_tenth_question_is_an_earlier_one_with_its_sides_swapped():
    questions = make_questions(PAIRS, seed=3)
    again = [i for i, q in enumerate(questions) if q.again]
    first = [q for q in questions if not q.again]
    assert again == [9, 19, 29, 39, 49] and len({q.key for q in questions}) == 50
    assert [q.prompt for q in first] == [prompt for prompt, _, _ in PAIRS]
    for i in again:
        twin = Question(questions[i].prompt, questions[i].right, questions[i].left)
        assert twin in questions[: i - 1]  # and not the one just asked
    assert 10 < sum("good" in q.left for q in first) < 35  # the sides are shuffled
    assert make_questions(PAIRS, seed=3) == questions != make_questions(PAIRS, seed=4)


def test_each_answer_is_on_disk_and_labelling_goes_on_where_it_stopped(path):
    """At every place: answers, repeats and skips are there again, and the next."""
    questions, keys = make_questions(PAIRS[:18], seed=5), "12s112s21221s1121212"
    labeller, chosen = Labeller(questions, path), []
    while question := labeller.question:
        key = keys[labeller.done]
        labeller.answer(key)
        if key != "s" and not question.again:
            chosen.append(question.left if key == "1" else question.right)
        later = Labeller(questions, path)
        assert later.question == labeller.question and later.done == labeller.done
        assert later.answers == labeller.answers and not later.faults
        assert later.report() == pytest.approx(labeller.report(), nan_ok=True)
    pairs, faults = read_pairs(path)
    assert [pair["chosen"] for pair in pairs] == chosen and not faults
    path.write_bytes(path.read_bytes() + b"{rubbish\n")  # costs nothing but itself
    later = Labeller(questions, path)
    assert later.answers == labeller.answers
    (fault,) = later.faults
    assert fault.startswith(f"{path}, line {len(chosen) + 1}: ")
    refused("all 20 questions are answered", labeller.answer, "1")


@pytest.mark.parametrize("restart", [False, True])
def test_undo_takes_the_last_answer_back_from_the_disk(path, restart):
    questions, kept = make_questions(PAIRS[:10], seed=0), []
    labeller = Labeller(questions, path)

    def on_disk():
        files = [file for file in labeller.files.values() if file.exists()]
        return [data for file in files if (data := file.read_bytes())]

    for key in "1s2111111" + "2":  # the last one answers a repeat
        kept.append(on_disk())
        labeller.answer(key)
    assert questions[9].again
    for number in reversed(range(10)):
        labeller = Labeller(questions, path) if restart else labeller
        labeller.answer("u")
        assert labeller.question == questions[number] and on_disk() == kept[number]
    for key, says in (("u", "no answer to undo"), ("3", "1, 2, s .skip. or u .undo.")):
        refused(says, labeller.answer, key)


def test_the_report_by_hand(path):
    """Of one who takes the left side, one who knows, and one who skips the repeated."""
    questions = make_questions(PAIRS[:10], seed=1)
    (again,) = (q for q in questions if q.again)
    left, nan = sum("good" in q.left for q in questions) / 11, math.nan
    for name, answer, expected in (
        ("left", lambda q: "1", (11, 0, 1.0, 1, 0.0)),
        ("knows", lambda q: "12"["good" in q.right], (11, 0, left, 1, 1.0)),
        ("skips", lambda q: "1s"[q.prompt == again.prompt], (9, 1, 1.0, 0, nan)),
        ("skips it then", lambda q: "1s"[q.again], (10, 1, 1.0, 0, nan)),
    ):
        labeller = Labeller(questions, path.with_name(name))
        while q := labeller.question:
            labeller.answer(answer(q))
        assert Labeller(questions, path.with_name(name)).answers == labeller.answers
        found = labeller.report()
        assert tuple(found.values()) == pytest.approx(expected, nan_ok=True), name
        said = "of 1 asked twice, the same one was chosen in 100%"
        assert (said in describe(found)) == (name == "knows")


def test_the_simulated_answers_are_as_frequent_as_bradley_and_terry_say():
    answer_of = import_cells(NOTEBOOKS["6"], "utility")["answer_of"]
    rng, n = random.Random(0), 20_000
    for gap, p in ((0, 0.5), (3, 0.9526), (-1, 0.2689), (800, 1)):
        share = sum(answer_of(gap, 0, rng) == "1" for _ in range(n)) / n
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_the_box_takes_clicks_and_keys_and_shows_texts_as_they_are(path):
    """Without a browser: what the widgets' own events call."""
    pairs = [("is <i>it</i>", f" a < {i}", f" b & {i}") for i in range(3)]
    labeller = Labeller(make_questions(pairs, seed=0), path)
    texts, buttons, field, bar, status = labelling_box(labeller).children
    first = labeller.question
    assert "&lt;i&gt;it&lt;/i&gt;" in texts.value and "<i>it" not in texts.value
    assert "<b> a &lt; " in texts.value and "<b> b &amp; " in texts.value
    buttons.children[1].click()
    assert labeller.answers[first.key] == first.right and bar.value == 1
    for key, done in (("1", 2), ("S", 3), ("u", 2)):
        field.value = key
        assert labeller.done == done and field.value == ""
    assert "2 of 3" in status.value
    field.value = "<"
    assert "got &#x27;&lt;&#x27;" in status.value
    buttons.children[0].click()
    assert "All questions are answered" in texts.value and bar.value == bar.max
    assert [b.disabled for b in buttons.children] == [True, True, True, False]
    buttons.children[3].click()
    assert labeller.done == 2 and not buttons.children[0].disabled
