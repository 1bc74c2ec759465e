"""A course in a folder of its own, with submissions that the tests make."""

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from exercises.collect import COURSE
from exercises.release import names, release

ROOT = COURSE.parent
EXERCISES = names()
ONE = "4-gae"  # the exercise on which submissions go wrong in every way
TIMEOUT = 15  # seconds; the endless loop is cut off then
ENVIRON = {
    **{k: v for k, v in os.environ.items() if not k.startswith("RLHF_")},
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
}
SOLUTION = re.compile(r"^ *### (BEGIN|END) SOLUTION\n?", re.M)


def source(name, course=COURSE):
    return nbformat.read(course / "source" / name / f"{name}.ipynb", as_version=4)


def solved(name):
    """The released notebook with the solutions of the source in it."""
    answers = {cell.id: cell.source for cell in source(name).cells}
    notebook = nbformat.read(COURSE / "release" / name / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = SOLUTION.sub("", answers[cell.id])
    return notebook


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def as_colab_saves(notebook):
    """The notebook as Colab writes it: nbformat 4.0, cell ids in the metadata."""
    notebook = copy.deepcopy(notebook)
    notebook.nbformat_minor = 0
    notebook.metadata = {
        "colab": {"provenance": [], "name": "Copy of something.ipynb"},
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata["id"] = cell.pop("id")
        if cell.cell_type == "code":
            cell.metadata["outputId"] = "0123"
            cell.execution_count = 7
            cell.outputs = [
                {"output_type": "stream", "name": "stdout", "text": "from Colab\n"}
            ]
    return notebook


def nbgrader(course, *arguments):
    """A command of nbgrader in the course, finished."""
    return subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course,
        env=ENVIRON,
        capture_output=True,
        text=True,
    )


def submissions(folder):
    """Right answers and stubs for all exercises, and trouble in one of them."""

    def put(notebook, name):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(notebook), "utf8")

    for name in EXERCISES:
        path = COURSE / "release" / name / f"{name}.ipynb"
        put(nbformat.read(path, as_version=4), f"stub/{name}.ipynb")
        put(solved(name), f"right/{name}.ipynb")

    # Right where the rubbish behind the end is finite, as on the visible example
    lucky = solved(ONE)
    answer = cell_of(lucky, "residuals")
    answer.source = answer.source.replace(
        ").masked_fill(outside, 0)", ") * (~outside).double()"
    )
    put(lucky, f"lucky/{ONE}.ipynb")

    tampered = nbformat.read(COURSE / "release" / ONE / f"{ONE}.ipynb", as_version=4)
    for cell in tampered.cells:
        mark = cell.metadata.get("nbgrader", {})
        if mark.get("grade") and not mark.get("solution"):
            cell.source, mark["points"] = "pass", 100
    tampered.cells = [c for c in tampered.cells if c.id != "hidden-gae"]
    put(tampered, f"tampered/{ONE}.ipynb")

    endless = solved(ONE)
    answer = cell_of(endless, "group-advantages")
    answer.source = answer.source.replace(
        "return ", "while True:\n        pass\n    return "
    )
    put(endless, f"endless/{ONE}.ipynb")

    put(as_colab_saves(solved(ONE)), f"colab/Copy of {ONE} (1).ipynb")
    bare = as_colab_saves(solved(ONE))  # should a tool drop what it does not know
    for cell in bare.cells:
        cell.metadata.pop("nbgrader", None)
    put(bare, "bare_Untitled3.ipynb")

    doubled = solved(ONE)
    doubled.cells.append(copy.deepcopy(cell_of(doubled, "gae")))
    doubled.cells[-1].id = "a-copy"
    put(doubled, f"doubled/{ONE}.ipynb")
    checked_twice = solved(ONE)
    checked_twice.cells.append(copy.deepcopy(cell_of(checked_twice, "check-gae")))
    checked_twice.cells[-1].id = "a-copy"
    put(checked_twice, f"checked-twice/{ONE}.ipynb")

    put(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}, "no/no.ipynb"
    )
    (folder / "empty").mkdir()
    (folder / "empty" / f"{ONE}.ipynb").write_text("")
    (folder / "broken").mkdir()
    whole = json.dumps(solved(ONE))
    (folder / "broken" / f"{ONE}.ipynb").write_text(whole[: len(whole) // 2])
    put(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]),
        "x/other.ipynb",
    )
    put(solved(ONE), "nobody.ipynb")


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    """An empty course with the sources, released, in what looks like the repository."""
    repository = tmp_path_factory.mktemp("repository")
    for part in ROOT.iterdir():
        if part.name not in ("runs", ".git"):
            (repository / part.name).symlink_to(part)
    folder = repository / "course"
    shutil.copytree(COURSE / "source", folder / "source")
    shutil.copy(COURSE / "nbgrader_config.py", folder)
    release(folder)
    return folder


@pytest.fixture(scope="session")
def collected(course, tmp_path_factory):
    """The course with the submissions collected; what `exercises.collect` said."""
    folder = tmp_path_factory.mktemp("returned")
    submissions(folder)
    return subprocess.run(
        [sys.executable, "-m", "exercises.collect", str(folder), "--course", course],
        cwd=ROOT,
        env=ENVIRON,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def marks(course, collected):
    """Autograded and exported: (student, exercise) -> a row of the marks."""
    for name in EXERCISES:
        done = nbgrader(
            course,
            "autograde",
            name,
            f"--Execute.timeout={TIMEOUT if name == ONE else 90}",
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert nbgrader(course, "export", "--to", "marks.csv").returncode == 0
    with Path(course / "marks.csv").open() as file:
        return {(r["student_id"], r["assignment"]): r for r in csv.DictReader(file)}
