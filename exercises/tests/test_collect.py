"""What comes back from a class, file by file."""

import copy
import json

import nbformat
import pytest

from exercises.collect import COURSE, collect
from exercises.tests.conftest import ONE, as_colab_saves, cell_of

RELEASED = COURSE / "release" / ONE / f"{ONE}.ipynb"


@pytest.fixture
def course(tmp_path):
    """A course where this one exercise has been handed out; `returned` is empty."""
    (tmp_path / "release" / ONE).mkdir(parents=True)
    (tmp_path / "release" / ONE / f"{ONE}.ipynb").write_text(RELEASED.read_text("utf8"))
    (tmp_path / "returned").mkdir()
    return tmp_path


@pytest.fixture
def notebook():
    return nbformat.read(RELEASED, as_version=4)


def put(course, notebook, name):
    path = course / "returned" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = notebook if isinstance(notebook, str) else json.dumps(notebook)
    path.write_text(text, "utf8")


def sorted_in(course):
    return collect(course / "returned", course)


def submitted(course, student="ada"):
    return course / "submitted" / student / ONE / f"{ONE}.ipynb"


def test_a_colab_file_becomes_what_nbgrader_wants(course, notebook):
    cell_of(notebook, "gae").source += "\n# my work"
    put(course, as_colab_saves(notebook), "ada/Copy of something (2).ipynb")
    assert sorted_in(course).placed
    found = nbformat.read(submitted(course), as_version=4)
    released = nbformat.read(RELEASED, as_version=4)
    assert [c.id for c in found.cells if "nbgrader" in c.metadata] == [
        c.id for c in released.cells if "nbgrader" in c.metadata
    ]
    assert cell_of(found, "gae").source.endswith("# my work")
    assert cell_of(found, "gae").metadata == cell_of(released, "gae").metadata
    assert found.metadata == released.metadata and found.nbformat_minor == 5
    assert all(not c.outputs for c in found.cells if c.cell_type == "code")


def test_the_students_own_cells_stay_where_they_are(course, notebook):
    place = notebook.cells.index(cell_of(notebook, "gae"))
    own = nbformat.v4.new_code_cell("import itertools", id="own")
    notebook.cells.insert(place, own)
    put(course, notebook, "ada/x.ipynb")
    sorted_in(course)
    found = nbformat.read(submitted(course), as_version=4)
    assert found.cells[place].source == "import itertools"
    assert found.cells[place + 1].id == "gae"


def test_an_answer_whose_kind_of_cell_was_changed_is_kept(course, notebook):
    answer = cell_of(notebook, "free-lambda")
    answer.cell_type, answer.source = "raw", "Lambda is a dial."
    put(course, notebook, "ada/x.ipynb")
    assert "put back" not in sorted_in(course).placed[0]
    found = cell_of(nbformat.read(submitted(course), as_version=4), "free-lambda")
    assert (found.cell_type, found.source) == ("markdown", "Lambda is a dial.")


def test_a_picture_in_an_answer_is_kept(course, notebook):
    picture = {"a.png": {"image/png": "aGVsbG8="}}
    cell_of(notebook, "free-lambda").attachments = picture
    put(course, notebook, "ada/x.ipynb")
    sorted_in(course)
    found = cell_of(nbformat.read(submitted(course), as_version=4), "free-lambda")
    assert found.attachments == picture


def test_missing_cells_are_put_back_and_named(course, notebook):
    gone = ("check-gae", "gae")
    notebook.cells = [c for c in notebook.cells if c.id not in gone]
    put(course, notebook, "ada/x.ipynb")
    (line,) = sorted_in(course).placed
    assert line.endswith("(put back: gae, check-gae)")
    ids = [c.id for c in nbformat.read(submitted(course), as_version=4).cells]
    assert ids.index("gae") + 1 == ids.index("check-gae")


def test_a_copied_answer_is_refused(course, notebook):
    twin = copy.deepcopy(cell_of(notebook, "gae"))
    twin.id = "twin"
    notebook.cells.append(twin)
    put(course, notebook, "ada/x.ipynb")
    report = sorted_in(course)
    assert not report.placed and not submitted(course).exists()
    assert "the cell gae is there more than once" in report.not_placed[0]


def test_two_files_of_one_student_are_both_refused(course, notebook):
    put(course, notebook, "ada/4.ipynb")
    put(course, notebook, "ada/4 (1).ipynb")
    report = sorted_in(course)
    assert not report.placed
    assert report.not_placed == [
        f"ada/4 (1).ipynb, ada/4.ipynb: all of them are {ONE} by ada; leave the one "
        "that counts, and collect again"
    ]


def test_names(course, notebook):
    put(course, notebook, "José Núñez_123_assignsubmission_file/x.ipynb")
    put(course, notebook, "ada_late_Copy of x.ipynb")
    put(course, notebook, "Ada/x.ipynb")
    put(course, notebook, "***/x.ipynb")
    report = sorted_in(course)
    assert submitted(course, "José-Núñez_123_assignsubmission_file").exists()
    # On some systems the folders "Ada" and "ada" would be one
    assert len(report.placed) == 2 and len(report.not_placed) == 2
    assert any("would share the folder" in line for line in report.not_placed)
    assert any("no letter or digit" in line for line in report.not_placed)
    assert sorted(p.name for p in course.iterdir()) == [
        "release",
        "returned",
        "submitted",
    ]


ODD = {
    "empty": "",
    "half": json.dumps({"nbformat": 4, "cells": []})[:20],
    "no-source": json.dumps(
        {
            **{"nbformat": 4, "nbformat_minor": 5, "metadata": {}},
            "cells": [{"cell_type": "code", "metadata": {}, "source": None}],
        }
    ),
    "a-list": "[1, 2]",
    "words": "my homework",
}


def test_odd_files_are_named_and_the_others_collected(course, notebook):
    for name, text in ODD.items():
        put(course, text, f"{name}/x.ipynb")
    (course / "returned" / "latin").mkdir()
    (course / "returned" / "latin" / "x.ipynb").write_bytes(b'{"cells": "\xe9"}')
    (course / "returned" / "link").mkdir()
    (course / "returned" / "link" / "x.ipynb").symlink_to("nowhere")
    cell_of(notebook, "gae").metadata["nbgrader"] = None
    put(course, "\ufeff" + json.dumps(notebook), "zoe/x.ipynb")
    put(course, "litter", "zoe/.DS_Store")
    put(course, "litter", "__MACOSX/zoe/._x.ipynb")
    report = sorted_in(course)
    assert submitted(course, "zoe").exists() and len(report.placed) == 1
    named = {line.split("/")[0] for line in report.not_placed}
    assert named == {*ODD, "latin", "link"}


def test_what_changed_gets_another_time(course, notebook):
    """nbgrader grades again what has a later timestamp, and only that."""
    put(course, notebook, "ada/x.ipynb")
    sorted_in(course)
    stamp = submitted(course).with_name("timestamp.txt")
    first = stamp.read_text()
    sorted_in(course)
    assert stamp.read_text() == first
    cell_of(notebook, "gae").source += "\n# better"
    put(course, notebook, "ada/x.ipynb")
    sorted_in(course)
    assert stamp.read_text() > first


def test_what_cannot_be_collected_from(course, tmp_path):
    with pytest.raises(NotADirectoryError, match="is no folder; name the one"):
        collect(tmp_path / "nowhere", course)
    with pytest.raises(FileNotFoundError, match="run python -m exercises.release"):
        collect(course / "returned", tmp_path / "returned")
