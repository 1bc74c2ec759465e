"""What comes back from a class, file by file."""

import os
import zipfile

import nbformat
import pytest

from exercises.collect import COURSE, collect, restore
from exercises.hand_back import archive, enter
from exercises.tests.conftest import (
    ONE,
    as_colab_saves,
    cell_of,
    put,
    read,
    with_a_copy_of,
)


@pytest.fixture
def course(tmp_path):
    """A course where one exercise has been handed out; `returned` is empty."""
    released = (COURSE / "release" / ONE / f"{ONE}.ipynb").read_text("utf8")
    put(tmp_path, released, f"release/{ONE}/{ONE}.ipynb")
    (tmp_path / "returned").mkdir()
    return tmp_path


@pytest.fixture
def collected(course):
    """`collected(notebook)`: what ada's notebook becomes, and what is said of it."""

    def collect_one(notebook):
        put(course / "returned", notebook, "ada/Copy of something (2).ipynb")
        (line,), _ = collect(course / "returned", course)
        return read(ONE, "submitted/ada", course), line

    return collect_one


def test_a_colab_file_becomes_what_nbgrader_wants(collected):
    """The answers and the student's own cells stay as they are, and where they are."""
    notebook, released = read(ONE), read(ONE)
    cell_of(notebook, "gae").source += "\n# my work"
    answer = cell_of(notebook, "free-lambda")
    answer.cell_type, answer.source = "raw", "Lambda is a dial."
    answer.attachments = {"a.png": {"image/png": "aGVsbG8="}}
    place = notebook.cells.index(cell_of(notebook, "gae"))
    own = nbformat.v4.new_code_cell("import itertools", id="own")
    notebook.cells.insert(place, own)
    found, line = collected(as_colab_saves(notebook))
    assert "put back" not in line
    assert len({cell.id for cell in found.cells}) == 25
    assert found.cells.pop(place).source == "import itertools"
    for ours, theirs in zip(found.cells, released.cells, strict=True):
        if "nbgrader" in theirs.metadata:
            assert (ours.id, ours.metadata) == (theirs.id, theirs.metadata)
            assert ours.cell_type == theirs.cell_type
    assert cell_of(found, "gae").source.endswith("# my work")
    answer = cell_of(found, "free-lambda")
    assert answer.source == "Lambda is a dial." and "a.png" in answer.attachments
    assert found.metadata == released.metadata and found.nbformat_minor == 5
    assert not any(cell.get("outputs") for cell in found.cells)


def test_missing_cells_are_put_back_and_named(collected):
    notebook, gone = read(ONE), ("check-gae", "gae")
    notebook.cells = [cell for cell in notebook.cells if cell.id not in gone]
    found, line = collected(notebook)
    assert line.endswith("(put back: gae, check-gae)")
    ids = [cell.id for cell in found.cells]
    assert ids.index("gae") + 1 == ids.index("check-gae") < ids.index("hidden-gae")


@pytest.mark.parametrize("gone", [False, True])
def test_a_text_in_a_cell_of_its_own_is_the_answer(collected, gone):
    """Below the empty one, or in its place: nbgrader would give 0, and ask nobody."""
    notebook = read(ONE)
    place = notebook.cells.index(empty := cell_of(notebook, "free-lambda"))
    own = nbformat.v4.new_markdown_cell("Lambda is a dial.", id="own")
    notebook.cells.insert(place + 1, own)
    if gone:
        notebook.cells.remove(empty)
    found, _ = collected(notebook)
    assert cell_of(found, "free-lambda").source == "Lambda is a dial."
    assert len(found.cells) == len(read(ONE).cells)
    restore(notebook, released := read(ONE))
    assert released == read(ONE)  # the next student's cells are still empty


def test_nothing_older_takes_the_place_of_what_counts(course):
    """Later work does, and is marked anew even if its file has the same time."""
    marked = course / f"autograded/ada/{ONE}/timestamp.txt"
    work, said = course / "returned/ada/x.ipynb", []
    for when, line in ((2000, "new"), (1000, "old"), (2000, "corrected")):
        notebook = read(ONE)
        cell_of(notebook, "gae").source += f"\n# {line}"
        put(course, notebook, "returned/ada/x.ipynb")
        put(course, "", marked.relative_to(course))
        os.utime(work, (when, when))
        said.append([*map(len, collect(course / "returned", course))])
        found = cell_of(read(ONE, "submitted/ada", course), "gae").source
        assert found.endswith("new" if line == "old" else line)
        assert marked.exists() == (line == "old")
    assert said == [[1, 0], [0, 1], [1, 0]]


NOT_PLACED = {  # a file, what is in it, and what is said
    "empty/x.ipynb": ("", "NotJSONError"),
    "other/x.ipynb": (nbformat.v4.new_notebook(), "fewer than half of the cells"),
    "two/4.ipynb": (read(ONE), "all of them are 4-gae"),
    "TWO/4 (1).ipynb": (read(ONE), "leave the one that counts"),
    "nobody.ipynb": (read(ONE), "nothing says whose it is"),
    "***/x.ipynb": (read(ONE), "no letter or digit"),
    "doubled/x.ipynb": (with_a_copy_of(read(ONE), "gae"), "gae is there more than"),
}


def test_odd_files_are_named_and_the_others_collected(course):
    folder = course / "returned"
    for name, (content, _) in NOT_PLACED.items():
        put(folder, content, name)
    put(folder, "litter", "zoe/.DS_Store")
    notebook = read(ONE)
    cell_of(notebook, "gae").metadata["nbgrader"] = None
    text = "\ufeff" + nbformat.writes(notebook)
    put(folder, text, "José Núñez_1_assignsubmission_file/x.ipynb")
    put(folder, notebook, "ada_late_Copy of x.ipynb")
    placed, not_placed = collect(folder, course)
    assert [line.split(" by ")[1] for line in placed] == ["José-Núñez", "ada"]
    assert (course / "submitted" / "José-Núñez" / ONE / f"{ONE}.ipynb").exists()
    said = "\n".join(not_placed)
    for name, (_, says) in NOT_PLACED.items():
        assert name in said and says in said, name
    assert len(not_placed) == len(NOT_PLACED) - 1  # the two are one


def test_what_changed_gets_another_time(course, collected):
    """nbgrader grades again what has a later timestamp, and only that."""
    stamp, notebook = course / f"submitted/ada/{ONE}/timestamp.txt", read(ONE)
    times = []
    for work in ("", "", "\n# better"):
        cell_of(notebook, "gae").source += work
        collected(notebook)
        times.append(stamp.read_text())
    assert times[0] == times[1] < times[2]


def test_feedback_is_called_as_what_came_back(course):
    """So a platform finds whose it is; of two that were not collected there is none."""
    moodle = "Ada Lovelace_17_assignsubmission_file/Copy of x (1)"
    canvas = "hoppergrace_LATE_12_345_x"
    for name in (moodle, canvas, "twice/1", "twice/2"):
        put(course / "returned", read(ONE), f"{name}.ipynb")
    put(course / "feedback", "her page", f"Ada-Lovelace/{ONE}/{ONE}.html")
    put(course / "feedback", "nbgrader's", f"Ada-Lovelace/{ONE}/timestamp.txt")
    put(course / "feedback", "it ended", f"hoppergrace/{ONE}/not-graded.txt")
    put(course / "feedback", "whose?", f"twice/{ONE}/{ONE}.html")
    for _ in range(2):
        (found,) = archive(course / "returned", course)
    assert found.name == f"feedback-{ONE}.zip"
    with zipfile.ZipFile(found) as file:
        pages = [(name, file.read(name)) for name in file.namelist()]
    assert pages == [(f"{moodle}.html", b"her page"), (f"{canvas}.txt", b"it ended")]


MARKS = """student_id,assignment,score
lovelaceada,4-gae,0.0
José-Núñez,4-gae,11.0
u17,2-reward-head,3.5
u17,4-gae,
twin,4-gae,7
16,4-gae,8
U17,2-reward-head,9
"""
CANVAS = """Student,ID,SIS Login ID,Section,2-Reward-Head (81),4-GAE (82)
    Points Possible,,,,16,15
"Lovelace, Ada",901,al,"A, B",,
"Hopper, Grace",903,u17,A,,4
"Doe, Jo",904,twin,A,,
"Doe, Jim",905,twin,A,,
"""
MOODLE = """\ufeffFirst name;Last name;Email address;Assignment: 4-gae (Real);Last
José;Núñez;jn@x.org;-;1
Grace;Hopper;U17@x.org;5;"2

3"
"""
GRADEBOOKS = [  # a platform's, what becomes of it, and whose marks have no place
    (
        CANVAS,
        {'B",,': 'B",,0.0', "u17,A,,": "u17,A,3.5,"},
        ["José", "twin", "16", "U17, 2-reward-head: another"],
    ),
    (
        MOODLE,
        {"\ufeff": "", "org;-": "org;11.0"},
        ["lovel", "u17", "twin", "16", "U17"],
    ),
]


@pytest.mark.parametrize("gradebook, changes, left", GRADEBOOKS)
def test_marks_stand_where_student_and_exercise_meet(
    tmp_path, gradebook, changes, left
):
    """What was there stays; whoever has no row, or shares one, is named."""
    put(tmp_path, MARKS, "marks.csv")
    put(tmp_path, gradebook, "book.csv")
    said = enter(tmp_path / "marks.csv", tmp_path / "book.csv")
    assert [x[: len(y)] for x, y in zip(said, left, strict=True)] == left
    for old, new in changes.items():
        gradebook = gradebook.replace(old, new)
    assert (tmp_path / "filled-book.csv").read_text("utf8") == gradebook
