"""The exercises, released, solved, collected and graded as an instructor does it."""

import io
import re
from contextlib import redirect_stdout

import pytest

from exercises.tests.conftest import EXERCISES, ONE, changed, read, run

FREE = 4  # points of the question that a person grades


def marks_of(name):
    cells = (c for c in read(name, "source").cells if "nbgrader" in c.metadata)
    return [c.metadata.nbgrader for c in cells if c.metadata.nbgrader.grade]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_release_is_in_step_with_its_source_and_gives_nothing_away(course, name):
    """If this fails: `python -m exercises.release`, and commit what it writes."""
    assert read(name) == read(name, course=course)
    for mark in ("SOLUTION", "HIDDEN TESTS", "MARK SCHEME", "**Points.**"):
        assert mark not in str(read(name))


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_get_full_marks_and_stubs_none(marks, course, name):
    """And every check of a stub, which runs to its end, says what is wrong."""
    whole = sum(mark.points for mark in marks_of(name))
    right, stub = marks["right", name], marks["stub", name]
    assert float(right["max_score"]) == float(stub["max_score"]) == whole
    assert float(right["score"]) == whole - FREE  # the rest is for a person to give
    assert float(stub["score"]) == 0
    said = []
    for cell in read(name, "autograded/stub", course).cells:
        kinds = {output.output_type for output in cell.get("outputs", ())}
        assert "error" not in kinds or cell.metadata.nbgrader.grade, cell.source
        if cell.id.startswith("check-"):
            said += [x.text for x in cell.outputs if x.output_type == "stream"]
    assert len(said) >= 3 and not any("✓" in text for text in said), said


LOST = {  # what a student gets on ONE: all but these cells
    "lucky": ["hidden-residuals", "hidden-gae"],
    "endless": ["check-group-advantages", "hidden-group-advantages"],
    "colab": [],
    "twice": [],
}


@pytest.mark.parametrize("student", LOST)
def test_what_each_gets(marks, course, student):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        grades = book.find_submission_notebook(ONE, ONE, student).grades
        found = {x.name: x.score for x in grades if not x.name.startswith("free-")}
    whole = {x.grade_id: x.points for x in marks_of(ONE) if not x.solution}
    assert found == whole | dict.fromkeys(LOST[student], 0)


def test_tampered_tests_are_restored_and_feedback_is_written(marks, course):
    assert marks["tampered", ONE]["score"] == "0.0"
    assert marks["tampered", ONE]["max_score"] == marks["right", ONE]["max_score"]
    done = run("nbgrader", "generate_feedback", ONE, cwd=course)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (course / "feedback" / "stub" / ONE / f"{ONE}.html").read_text("utf8")
    assert "residuals" in text and "this is what you get when" in text


# What a learner may well write, and what the check then says: the cell, what of the
# solution is replaced by what, and the words.
WRONG = [
    ("causal-pairs", "places >= ", "places > ", "not masked|shifted"),
    ("close-rows", "(row + [eos])[:max_tokens]", "row[: max_tokens - 1] + [eos]",
     "as if it had ended"),
    ("loss-per-text", "-((right * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "-(right * mask).sum() / mask.sum()", "every token weighs the same"),
    ("last-two", "from_right <= 2", "from_right <= 1", "only the last token"),
    ("smoothed-bce", "y = labels * (1 - 2 * eps) + eps", "y = labels", "not smoothed"),
    ("all-pairs", "- margin", "+ margin", "margin is added"),
    ("gain-and-bias", "correction=0", "correction=1", "N - 1"),
    ("response-kl", "expm1(-ratio) + ratio", "expm1(ratio) - ratio", "reversed"),
    ("exact-kl", "if word != 0:", "if True:", "after EOS"),
    ("rewards-with-cost", "-beta * log_ratio", "beta * log_ratio", "wrong sign"),
    ("spend", "scores / beta", "scores * beta", "multiplies"),
    ("residuals", "following[torch.arange(batch), lengths - 1] = bootstrap",
     "following[torch.arange(batch), lengths - 1] = 0", "after a cut"),
    ("gae", "gamma * lam * following", "lam * following", "lambda alone"),
    ("reward-to-go", "following = bootstrap", "following = 0 * bootstrap",
     "after a cut"),
    ("group-advantages", "spread = members.std(correction=0)", "spread = members.std()",
     "N - 1"),
    ("response-ratio", "/ mask.sum(dim=1)", "", "without the root"),
    ("clipped-loss", "torch.maximum", "torch.minimum", "smaller"),
    ("clipped-value-loss", "torch.maximum", "torch.minimum", "smaller"),
    ("repair-1", "policy = copy.deepcopy(lm)", "policy = lm", "original itself"),
    ("repair-2", "-beta * log_ratio", "0 * log_ratio", "no KL penalty"),
    ("repair-3", ".eval()", "", "training mode"),
    ("repair-6", "returns = (advantages + values)", "returns = advantages",
     "lack the values"),
    ("tournament-loss", "outcomes * wins + (1 - outcomes) * losses", "wins",
     "outcome is ignored"),
    ("dpo-losses", "(place < starts[:, None]) | ", "", "tokens of the prompt"),
    ("dpo-losses", "(starts + lengths)", "(starts + lengths - 1)", "EOS is left out"),
    ("dpo-losses", "ratio[0::2] - ratio[1::2]", "ratio[1::2] - ratio[0::2]",
     "are swapped"),
    ("pulls", "- (1 - eps)", "- 1", "nothing is smoothed"),
    ("pulls", "1 / (2 * beta)", "1 / beta", "not half of it"),
    ("keep-back", "held |= prompts == numbers[i]",
     "held[(prompts == numbers[i]).nonzero()[0]] = True", "cut within"),
    ("adapt", "** 0.5", "", "not by its root"),
    ("merge", "update = update.t()", "pass", "not transposed"),
    ("read", "model.hidden(None)", 'model.hidden("actor")', "KL is 0"),
]  # fmt: skip


@pytest.mark.parametrize("answer, right, wrong, says", WRONG)
def test_a_likely_mistake_is_named(answer, right, wrong, says):
    """The answer cell, wrong, and the check that follows it."""
    (name,) = (x for x in EXERCISES if answer in [cell.id for cell in read(x).cells])
    left_out = ("run-", "name-", "check-name-", "setup", "code-", "revealed")
    space, said = {}, io.StringIO()
    with redirect_stdout(said):
        for cell in changed(name, answer, right, wrong).cells:
            if cell.id == f"check-{answer}":
                said.seek(said.truncate(0))
            if cell.cell_type == "code" and not cell.id.startswith(left_out):
                source = cell.source.replace("healthy = museum.train()", "")
                exec(compile(source, f"{name}#{cell.id}", "exec"), space)
            if cell.id == f"check-{answer}":
                break
    assert "✗" in said.getvalue()
    assert re.search(says, said.getvalue()), said.getvalue()
