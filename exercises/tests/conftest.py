"""A course in a folder of its own, with submissions that the tests make."""

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from exercises.collect import COURSE, collect
from exercises.release import release

EXERCISES = sorted(path.stem for path in COURSE.glob("source/*/*.ipynb"))
ONE = "4-gae"  # the exercise on which submissions go wrong
TIMEOUT = 15  # seconds; the endless loop is cut off then
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
ENVIRON |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
SOLUTION = re.compile(r"^ *### (BEGIN|END) SOLUTION\n?", re.M)


def read(name, where="release", course=COURSE):
    path = course / where / name / f"{name}.ipynb"
    return nbformat.read(path, as_version=4)


def solved(name):
    """The released notebook with the solutions of the source in it."""
    answers = {cell.id: cell.source for cell in read(name, "source").cells}
    notebook = read(name)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = SOLUTION.sub("", answers[cell.id])
    return notebook


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def changed(name, answer, right, wrong):
    """The solved notebook with another answer in a cell."""
    notebook = solved(name)
    cell = cell_of(notebook, answer)
    assert right in cell.source
    cell.source = cell.source.replace(right, wrong)
    return notebook


def with_a_copy_of(notebook, name):
    twin = copy.deepcopy(cell_of(notebook, name))
    twin.id = "a-copy"
    notebook.cells.append(twin)
    return notebook


def as_colab_saves(notebook):
    """The notebook as Colab writes it: nbformat 4.0, cell ids in the metadata."""
    notebook.nbformat_minor = 0
    notebook.metadata = {"colab": {"name": "Copy of something.ipynb"}}
    for cell in notebook.cells:
        cell.metadata["id"] = cell.pop("id")
        if cell.cell_type == "code":
            cell.metadata["outputId"], cell.execution_count = "0123", 7
            said = {"output_type": "stream", "name": "stdout", "text": "from Colab\n"}
            cell.outputs = [said]
    return notebook


def put(folder, content, name):
    """Write a notebook, or a text, as a file of this name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, "utf8")


def tampered():
    """A notebook whose tests pass whatever is answered, and one of them is gone."""
    notebook = read(ONE)
    for cell in notebook.cells:
        mark = cell.metadata.get("nbgrader", {})
        if mark.get("grade") and not mark.get("solution"):
            cell.source, mark["points"] = "pass", 100
    notebook.cells = [cell for cell in notebook.cells if cell.id != "hidden-gae"]
    return notebook


def run(*command, cwd):
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=ENVIRON, capture_output=True, text=True)


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    """A course with the sources, released, in what looks like the repository."""
    repository = tmp_path_factory.mktemp("repository")
    for part in COURSE.parent.iterdir():
        if part.name not in ("runs", ".git"):
            (repository / part.name).symlink_to(part)
    folder = repository / "course"
    shutil.copytree(COURSE / "source", folder / "source")
    shutil.copy(COURSE / "nbgrader_config.py", folder)
    release(folder)
    return folder


@pytest.fixture(scope="session")
def marks(course, tmp_path_factory):
    """Collected, autograded and exported: (student, exercise) -> a row of the marks."""
    folder = tmp_path_factory.mktemp("returned")
    for name in EXERCISES:
        put(folder, read(name), f"stub/{name}.ipynb")
        put(folder, solved(name), f"right/{name}.ipynb")
    # Right where the rubbish behind the end is finite, as on the visible example
    swap = ("residuals", ").masked_fill(outside, 0)", ") * (~outside).double()")
    put(folder, changed(ONE, *swap), "lucky/x.ipynb")
    swap = ("group-advantages", "return ", "while True:\n        pass\n    return ")
    put(folder, changed(ONE, *swap), "endless/x.ipynb")
    put(folder, tampered(), "tampered/x.ipynb")
    put(folder, as_colab_saves(solved(ONE)), "colab/Copy of x (1).ipynb")
    put(folder, with_a_copy_of(solved(ONE), "check-gae"), "twice_x.ipynb")
    put(folder, "", "empty/x.ipynb")
    assert len(collect(folder, course)[1]) == 1
    for name in EXERCISES:
        cut = f"--Execute.timeout={TIMEOUT if name == ONE else 90}"
        done = run("nbgrader", "autograde", name, cut, cwd=course)
        assert done.returncode == 0, done.stderr[-3000:]
    run("nbgrader", "export", "--to", "marks.csv", cwd=course)
    with (course / "marks.csv").open() as file:
        return {(r["student_id"], r["assignment"]): r for r in csv.DictReader(file)}
