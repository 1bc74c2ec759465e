"""The exercises, released, solved, collected and graded as an instructor does it."""

import io
import json
import re
import statistics
from contextlib import redirect_stdout

import nbformat
import pytest
from nbclient import NotebookClient

from exercises.collect import COURSE
from exercises.tests.conftest import (
    ENVIRON,
    EXERCISES,
    ONE,
    ROOT,
    cell_of,
    nbgrader,
    solved,
    source,
)

FREE = 4  # points of the question that a person grades


def released(name, course=COURSE):
    return course / "release" / name / f"{name}.ipynb"


def marks_of(notebook):
    return [
        cell.metadata.nbgrader for cell in notebook.cells if "nbgrader" in cell.metadata
    ]


@pytest.mark.parametrize("name", EXERCISES)
def test_what_a_learner_gets_has_short_cells(name):
    """The bounds of the lessons. The source has solutions and hidden tests besides."""
    cells = nbformat.read(released(name), as_version=4).cells
    lengths = [len(c.source.splitlines()) for c in cells if c.cell_type == "code"]
    assert statistics.median(lengths) <= 10 and max(lengths) <= 40


def test_there_are_nine():
    assert [name[0] for name in EXERCISES] == list("123456789")


@pytest.mark.parametrize("name", EXERCISES)
def test_the_release_is_in_step_with_its_source(course, name):
    """If this fails: `python -m exercises.release`, and commit what it writes."""
    assert released(name).read_text("utf8") == released(name, course).read_text("utf8")


@pytest.mark.parametrize("name", EXERCISES)
def test_the_release_gives_nothing_away(name):
    text = released(name).read_text("utf8")
    for mark in ("SOLUTION", "HIDDEN TESTS", "MARK SCHEME", "**Points.**"):
        assert mark not in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    whole = "\n".join(cell.source for cell in notebook.cells)
    for cell in source(name).cells:
        for hidden in re.findall(
            r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", cell.source, re.S
        ):
            kept = [x for x in hidden.splitlines() if len(x.strip()) > 25]
            for line in kept:
                assert line not in whole or line in visible(source(name)), line
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def visible(notebook):
    marked = r"### BEGIN (SOLUTION|HIDDEN TESTS)\n.*?### END \1"
    return "\n".join(
        re.sub(marked, "", cell.source, flags=re.S) for cell in notebook.cells
    )


@pytest.mark.parametrize("name", EXERCISES)
def test_each_has_what_an_exercise_needs(name):
    notebook = source(name)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for part in ("**Goals**", "**Difficulty**", "**Time**", "minutes", "<details>"):
        assert part in text, part
    assert "**Predict first.**" in text and "**Points.**" in text
    assert f"/blob/main/exercises/release/{name}/{name}.ipynb" in text
    marks = marks_of(notebook)
    assert len({mark.grade_id for mark in marks}) == len(marks)
    graded = [mark for mark in marks if mark.grade]
    assert len(graded) >= 7
    assert sum(m.points for m in graded if m.solution) == FREE
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 88, cell.id
            if cell.metadata.get("nbgrader", {}).get("grade"):
                assert "### BEGIN HIDDEN TESTS" in cell.source


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_runs_from_top_to_bottom(name):
    """`Run all` on the notebook as handed out: every check says what is wrong."""
    notebook = nbformat.read(released(name), as_version=4)
    folder = {"metadata": {"path": str(released(name).parent)}}
    NotebookClient(notebook, timeout=90, resources=folder).execute(env=ENVIRON)
    said = [
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.id.startswith("check-")
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    assert len(said) >= 3
    assert not any("✓" in text for text in said), said


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_get_full_marks_and_stubs_none(marks, name):
    whole = sum(mark.points for mark in marks_of(source(name)) if mark.grade)
    right, stub = marks["right", name], marks["stub", name]
    assert float(right["max_score"]) == float(stub["max_score"]) == whole
    assert float(right["score"]) == whole - FREE  # the rest is for a person to give
    assert float(stub["score"]) == 0


def points(course, student, name=ONE):
    """The points of each autograded cell."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        notebook = book.find_submission_notebook(name, name, student)
        return {
            grade.name: grade.score
            for grade in notebook.grades
            if not grade.name.startswith("free-")
        }


def full(name=ONE):
    return {
        mark.grade_id: mark.points
        for mark in marks_of(source(name))
        if mark.grade and not mark.solution
    }


def test_luck_on_the_visible_example_is_not_enough(marks, course):
    found = points(course, "lucky")
    assert found["check-residuals"] == 1 and found["hidden-residuals"] == 0
    assert found["check-gae"] == 1 and found["hidden-gae"] == 0


def test_tampered_and_deleted_tests_are_restored(marks, course, collected):
    assert marks["tampered", ONE]["score"] == "0.0"
    assert marks["tampered", ONE]["max_score"] == marks["right", ONE]["max_score"]
    assert "by tampered (put back: hidden-gae)" in collected.stdout


def test_an_endless_loop_is_cut_off(marks, course):
    cut = dict.fromkeys(("check-group-advantages", "hidden-group-advantages"), 0)
    assert points(course, "endless") == {**full(), **cut}


@pytest.mark.parametrize("student", ["colab", "bare", "checked-twice"])
def test_what_colab_does_to_a_file_does_no_harm(marks, course, student):
    assert points(course, student) == full()


def test_what_cannot_be_placed_is_named(collected):
    said = collected.stdout
    assert collected.returncode == 1, collected.stderr
    for line in (
        rf"empty/{ONE}.ipynb: it is empty",
        rf"broken/{ONE}.ipynb: it is no notebook",
        r"no/no.ipynb: it has no cells",
        r"x/other.ipynb: it is none of 1-tokens-and-sft, ",
        r"nobody.ipynb: nothing says whose it is",
        rf"doubled/{ONE}.ipynb: the cell gae is there more than once",
    ):
        assert re.search(rf"NOT PLACED: 6\n(.*\n)*  {line}", said), line


def test_the_marks_of_the_others_are_there(marks):
    students = {student for student, _ in marks}
    assert {"right", "stub", "lucky", "tampered", "endless", "colab"} <= students
    assert not {"empty", "broken", "doubled"} & students


def test_feedback_is_written(marks, course):
    done = nbgrader(course, "generate_feedback", ONE)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (course / "feedback" / "stub" / ONE / f"{ONE}.html").read_text("utf8")
    assert "residuals" in text and "this is what you get when" in text


# What a learner may well write, and what the check then says: the exercise, the cell,
# what of the solution is replaced by what, and the words.
WRONG = [
    ("1-tokens-and-sft", "causal-pairs", "places >= ", "places > ",
     "not masked|shifted"),
    ("1-tokens-and-sft", "close-rows", "(row + [eos])[:max_tokens]",
     "row[: max_tokens - 1] + [eos]", "as if it had ended"),
    ("1-tokens-and-sft", "loss-per-text",
     "-((right * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
     "-(right * mask).sum() / mask.sum()", "every token weighs the same"),
    ("2-reward-head", "last-two", "from_right <= 2", "from_right <= 1",
     "only the last token"),
    ("2-reward-head", "smoothed-bce", "y = labels * (1 - 2 * eps) + eps", "y = labels",
     "not smoothed"),
    ("2-reward-head", "all-pairs", "- margin", "+ margin", "margin is added"),
    ("2-reward-head", "gain-and-bias", "correction=0", "correction=1", "N - 1"),
    ("3-rewards-and-kl", "response-kl", "expm1(-ratio) + ratio",
     "expm1(ratio) - ratio", "reversed"),
    ("3-rewards-and-kl", "exact-kl", "if word != 0:", "if True:", "after EOS"),
    ("3-rewards-and-kl", "rewards-with-cost", "-beta * log_ratio", "beta * log_ratio",
     "wrong sign"),
    ("3-rewards-and-kl", "spend", "scores / beta", "scores * beta", "multiplies"),
    (ONE, "residuals", "following[torch.arange(batch), lengths - 1] = bootstrap",
     "following[torch.arange(batch), lengths - 1] = 0", "after a cut"),
    (ONE, "gae", "gamma * lam * following", "lam * following", "lambda alone"),
    (ONE, "reward-to-go", "following = bootstrap", "following = 0 * bootstrap",
     "after a cut"),
    (ONE, "group-advantages", "spread = members.std(correction=0)",
     "spread = members.std()", "N - 1"),
    ("5-ppo-losses", "response-ratio", "/ mask.sum(dim=1)", "", "without the root"),
    ("5-ppo-losses", "clipped-loss", "torch.maximum", "torch.minimum", "smaller"),
    ("5-ppo-losses", "clipped-value-loss", "torch.maximum", "torch.minimum", "smaller"),
    ("6-bug-museum", "repair-1", "policy = copy.deepcopy(lm)", "policy = lm",
     "original itself"),
    ("6-bug-museum", "repair-2", "-beta * log_ratio", "0 * log_ratio", "no KL penalty"),
    ("6-bug-museum", "repair-3", ".eval()", "", "training mode"),
    ("6-bug-museum", "repair-6", "returns = (advantages + values)",
     "returns = advantages", "lack the values"),
    ("8-preferences", "tournament-loss", "outcomes * wins + (1 - outcomes) * losses",
     "wins", "outcome is ignored"),
    ("8-preferences", "dpo-losses", "(place < starts[:, None]) | ", "",
     "tokens of the prompt"),
    ("8-preferences", "dpo-losses", "(starts + lengths)", "(starts + lengths - 1)",
     "EOS is left out"),
    ("8-preferences", "dpo-losses", "ratio[0::2] - ratio[1::2]",
     "ratio[1::2] - ratio[0::2]", "are swapped"),
    ("8-preferences", "pulls", "- (1 - eps)", "- 1", "nothing is smoothed"),
    ("8-preferences", "pulls", "1 / (2 * beta)", "1 / beta", "not half of it"),
    ("8-preferences", "keep-back", "held |= prompts == numbers[i]",
     "held[(prompts == numbers[i]).nonzero()[0]] = True", "cut within"),
    ("9-adapters", "adapt", "** 0.5", "", "not by its root"),
    ("9-adapters", "merge", "update = update.t()", "pass", "not transposed"),
    ("9-adapters", "read", "model.hidden(None)", 'model.hidden("actor")', "KL is 0"),
]  # fmt: skip


@pytest.mark.parametrize("name, answer, right, wrong, says", WRONG)
def test_a_likely_mistake_is_named(name, answer, right, wrong, says):
    """The answer cell, wrong, and the check that follows it."""
    notebook = solved(name)
    cells = notebook.cells
    cell = cell_of(notebook, answer)
    assert right in cell.source
    cell.source = cell.source.replace(right, wrong)
    last = next(i for i, c in enumerate(cells) if c.id == f"check-{answer}")
    left_out = ("run-", "name-", "check-name-", "setup", "code-", "revealed")
    space, said = {}, io.StringIO()
    with redirect_stdout(said):
        for c in cells[: last + 1]:
            if c.id == f"check-{answer}":
                said.seek(said.truncate(0))
            if c.cell_type == "code" and not c.id.startswith(left_out):
                text = c.source.replace("healthy = museum.train()", "")
                exec(compile(text, f"{name}#{c.id}", "exec"), space)
    assert "✗" in said.getvalue()
    assert re.search(says, said.getvalue()), said.getvalue()


def test_the_sources_run_no_library_that_a_learner_lacks():
    """nbgrader is the instructor's: its bound on IPython breaks Colab."""
    assert "nbgrader" not in (ROOT / "requirements.txt").read_text()
    for name in EXERCISES:
        code = [c.source for c in source(name).cells if c.cell_type == "code"]
        assert "nbgrader" not in json.dumps(code)
