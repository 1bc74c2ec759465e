"""The exercises, released, solved, collected and graded as an instructor does it."""

import csv
import io
import os
import re
from contextlib import redirect_stdout

import nbformat
import pytest
from nbgrader.api import Gradebook

from exercises.apart import ROOT, contents, wall
from exercises.collect import collect
from exercises.grade import grade
from exercises.release import hand_out
from exercises.tests.conftest import (
    EXERCISES,
    ONE,
    as_colab_saves,
    cell_of,
    changed,
    put,
    read,
    run,
    solved,
    tampered,
    with_a_copy_of,
)

FREE = 4  # points of the question that a person grades
TIMEOUT = 15  # seconds; the endless loop is cut off then


def own(lines):
    """ONE, solved, with lines of the student's own behind an answer."""
    return changed(ONE, "residuals", "return delta", f"return delta\n{lines}")


def without(name, typed_anew=False):
    """ONE, solved, but for a cell: it is gone, or typed in anew."""
    cell = cell_of(notebook := solved(ONE), name)
    if typed_anew:
        cell.id, cell.metadata = "own", {}
    else:
        notebook.cells.remove(cell)
    return notebook


ENDS = ("\\n", "\\r\\n")
LOUD = "import sys; print('on stderr', file=sys.stderr); return "
LOOP = "while True:\n        pass\n    return "
ONCE = "import os; f = os.environ['ONCE']; os.path.exists(f) or (os.mkdir(f), exit())"
PATCH = "import practice.checks as c; c.compare = lambda *given, **named: True"
SPOIL = "open('utils/ppo.py', 'w'); open('exercises/note.txt', 'w')"
REACH = f"""from pathlib import Path
for place in ('exercises', {str(ROOT / "exercises")!r}):
    print('seen:', [x.name for x in Path(place).glob('source*')])
__import__('socket').create_connection(('127.0.0.1', 9))"""
NOTHING = r"(?s)seen: \[\]\nseen: \[\]\n.*unreachable" if wall(ROOT) else "seen"
R, G, LONG = "residuals", "group-advantages", f"took longer than {TIMEOUT} seconds"
LONG_RUNS = ("run-", "setup", "code-", "revealed", "again")
# What comes back of ONE: the work, the cells that give no points for it, what is said
# in marks.csv, and what in the feedback
SUBMISSIONS = {
    # Right where the rubbish behind the end is finite, as on the visible example; it
    # costs nothing in `gae`, which takes the residuals
    "lucky": (changed(ONE, R, ").masked_fill(outside, 0)", ") * (~outside).double()"),
              [f"hidden-{R}"], "^text not graded$", "Tensor-likes are not close"),
    "endless": (changed(ONE, G, "return ", LOOP), [f"check-{G}", f"hidden-{G}"],
                LONG, f"this cell {LONG}, and was stopped"),
    "exits": (own("exit()"), ..., "^not graded: the kernel ended in the cell", "exit"),
    "once": (own(ONCE), [], "^text not graded$", ""),
    "tampered": (tampered(), ..., "^graded$", "this is what you get when"),
    "stub": (read(ONE), ..., "^graded$", "✗"),
    "colab": (as_colab_saves(with_a_copy_of(solved(ONE), "check-gae")), [], "^t", ""),
    "windows": (nbformat.writes(changed(ONE, G, "return ", LOUD)).replace(*ENDS), [],
                "^text not graded$", "on stderr"),
    "patched": (own(PATCH), [], "look at this one: has the line .*c.compare =", ""),
    "reads": (own(REACH), [], "look at this one: has the line .*glob", NOTHING),
    "deleted": (without("gae"), ["check-gae", "hidden-gae"], "^text not graded$", ""),
    "renamed": (without("gae", typed_anew=True), [], "^text not graded$", ""),
    "raises": (own("raise OSError('mine')"), [], "^text not graded$", "OSError"),
    "floods": (own("print('x\\n' * 300_000)"), [], "^text not graded$", "truncated"),
    "shell": (own("!echo mine"), [], "look at this one: has the line '!echo", "mine"),
    "spoils": (own(SPOIL), [], "wrote 'exercises/note.txt'; wrote 'utils/ppo.py'", ""),
}  # fmt: skip


@pytest.fixture(scope="session")
def marks(course, tmp_path_factory):
    """Collected, graded and exported: (student, exercise) -> a row of the marks."""
    folder = tmp_path_factory.mktemp("returned")
    before, os.environ["ONCE"] = contents(ROOT / "utils"), str(folder / ".once")
    for student, (work, *_) in SUBMISSIONS.items():
        put(folder, work, f"{student}_123_assignsubmission_file/Copy of x (1).ipynb")
    for name in EXERCISES:
        put(folder, solved(name), f"right/{name}.ipynb")
    os.utime(folder / f"right/{ONE}.ipynb", (1767323045, 1767323045))
    assert collect(folder, course)[1] == []
    grade((ONE,), TIMEOUT, course=course)
    grade(course=course)
    assert run("nbgrader", "generate_feedback", ONE, cwd=course).returncode == 0
    assert run("nbgrader", "export", "--to", "marks.csv", cwd=course).returncode == 0
    assert contents(ROOT / "utils") == before
    with (course / "marks.csv").open() as file:
        return {(r["student_id"], r["assignment"]): r for r in csv.DictReader(file)}


def marks_of(name):
    cells = (c for c in read(name, "source").cells if "nbgrader" in c.metadata)
    return [c.metadata.nbgrader for c in cells if c.metadata.nbgrader.grade]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_release_is_in_step_with_its_source_and_gives_nothing_away(course, name):
    """If this fails: `python -m exercises.release`, and commit what it writes."""
    assert read(name) == read(name, course=course)
    for mark in ("SOLUTION", "HIDDEN TESTS", "MARK SCHEME", "**Points.**"):
        assert mark not in str(read(name))


def executed(cells, until=None, left_out="setup"):
    """What each code cell prints, and its error, but for those that are left out."""
    space, found = {}, {}
    for cell in cells:
        if cell.cell_type == "code" and not cell.id.startswith(left_out):
            said, error = io.StringIO(), None
            try:
                with redirect_stdout(said):
                    exec(compile(cell.source, cell.id, "exec"), space)
            except Exception as fault:
                error = fault
            found[cell.id] = said.getvalue(), error
        if cell.id == until:
            break
    return found


def with_hidden_tests(name, answers):
    """The cells as they are graded: the source's, with these answers."""
    for cell in read(name, "source").cells:
        mark = cell.metadata.get("nbgrader", {})
        yield cell_of(answers, cell.id) if mark.get("solution") else cell


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_get_full_marks_and_stubs_none(marks, name):
    """And every check of a stub, which runs to its end, says what is wrong."""
    whole, right = sum(mark.points for mark in marks_of(name)), marks["right", name]
    said = re.search(r"\*\*Points\*\* \| (.*) \|", read(name).cells[0].source)[1]
    assert sum(map(int, re.findall(r": (\d+)", said))) == whole
    assert float(right["max_score"]) == whole
    assert float(right["code"]) == whole - FREE  # the rest is for a person to give
    assert right["score"] == "" and right["state"] == "text not graded"
    found = executed(with_hidden_tests(name, read(name)))
    failed = {cell for cell, (_, error) in found.items() if error}
    assert failed == {x.grade_id for x in marks_of(name) if not x.solution}
    said = [said for cell, (said, _) in found.items() if cell.startswith("check-")]
    assert len(said) >= 3 and not any("✓" in text for text in said), said


@pytest.mark.parametrize("student", SUBMISSIONS)
def test_what_each_gets(marks, course, student):
    _, lost, state, feedback = SUBMISSIONS[student]
    row, folder = marks[student, ONE], course / "feedback" / student / ONE
    assert re.search(state, row["state"]), row
    page = f"{ONE}.html" if row["code"] else "not-graded.txt"
    assert re.search(feedback, (folder / page).read_text("utf8"))
    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        grades = book.find_submission_notebook(ONE, ONE, student).grades
        found = {x.name: x.score for x in grades if not x.name.startswith("free-")}
    whole = {x.grade_id: x.points for x in marks_of(ONE) if not x.solution}
    assert found == whole | dict.fromkeys(whole if lost is ... else lost, 0)
    assert marks[student, EXERCISES[0]]["state"] == "not handed in"
    assert marks["right", ONE]["timestamp"].startswith("2026-01-02 03:04:05")


@pytest.mark.parametrize("repository", ["", "you/course"])
def test_what_students_get_has_no_sources_and_runs(course, tmp_path, repository):
    hand_out(tmp_path, repository, course)
    for path in (x for x in tmp_path.rglob("*") if x.is_file()):
        assert b"## BEGIN" not in path.read_bytes() and path.suffix != ".db", path
    cells = read(ONE, course=tmp_path / "exercises").cells
    title, code = cells[0].source, cells[1].source
    assert f"github.com/{repository}" in code
    title += (tmp_path / "exercises/capstone.ipynb").read_text("utf8")
    badges = title.count("[!["), title.count(f"github/{repository}/blob")
    assert badges == ((2, 2) if repository else (0, 0))
    code += "\nfrom exercises import museum; print(museum.__file__)"
    done = run("IPython", "-c", code, cwd=tmp_path / "exercises")
    assert str(tmp_path) in done.stdout, done.stderr
    with pytest.raises(FileExistsError, match="has sources in it"):
        hand_out(ROOT)


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
    (name,) = (x for x in EXERCISES if answer in [cell.id for cell in read(x).cells])
    check = f"check-{answer}"
    found = executed(changed(name, answer, right, wrong).cells, check, LONG_RUNS)
    assert "✗" in found[check][0] and re.search(says, found[check][0]), found[check]
    assert not any(error for _, error in found.values())


def test_a_wrong_part_costs_nothing_in_the_step():
    """As graded, hidden tests included: `ppo_step` takes right losses."""
    answers = changed("5-ppo-losses", "clipped-loss", "torch.maximum", "torch.minimum")
    found = executed(with_hidden_tests("5-ppo-losses", answers))
    failed = [cell for cell, (_, error) in found.items() if error]
    assert failed == ["check-clipped-loss", "hidden-clipped-loss"]
