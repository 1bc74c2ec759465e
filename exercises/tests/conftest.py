"""A course in a folder of its own, with submissions that the tests make."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from exercises.collect import COURSE
from exercises.release import release

EXERCISES = sorted(path.stem for path in COURSE.glob("source/*/*.ipynb"))
ONE = "4-gae"  # the exercise on which submissions go wrong
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
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, "utf8")


def tampered():
    """A notebook whose tests pass whatever is answered, and one of them is gone."""
    notebook = read(ONE)
    notebook.cells.remove(cell_of(notebook, "hidden-gae"))
    for cell in (x for x in notebook.cells if x.id.startswith(("check-", "hidden-"))):
        cell.source, cell.metadata.nbgrader.points = "pass", 100
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
