"""Sort submitted notebooks into nbgrader's folders: `python -m exercises.collect DIR`.

`nbgrader zip_collect` goes by the name of a file, and takes it as it is. Files come
back as "Copy of 4-gae (1).ipynb", without cell ids, in an older version of the format.
So an exercise is recognised here by its cells, and what stands around them is restored;
where it is not clear which file or which answer counts, it is said, and none is graded.
"""

import argparse
import re
import sys
import unicodedata
from collections import defaultdict
from copy import deepcopy
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import nbformat

COURSE, STAMP = Path(__file__).parent, "timestamp.txt"


def graded(notebook) -> dict:
    """The cells of a released notebook that nbgrader knows, by their id."""
    cells = (cell for cell in notebook.cells if "nbgrader" in cell.metadata)
    return {cell.metadata.nbgrader.grade_id: cell for cell in cells}


def grade_id(cell, known) -> str | None:
    """Which of the known cells this is: by nbgrader's id, or by the cell's own.

    Colab keeps a cell's id among its metadata.
    """
    marks = cell.get("metadata", {})
    names = ((marks.get("nbgrader") or {}).get("grade_id"), marks.get("id"))
    return next((name for name in (*names, cell.get("id")) if name in known), None)


def recognise(notebook, exercises: dict) -> str:
    """The exercise most of whose cells are there; ValueError if it is none."""
    shares = {}
    for name, release in exercises.items():
        known = graded(release)
        there = {grade_id(cell, known) for cell in notebook.cells} - {None}
        shares[name] = len(there) / len(known)
    if max(shares.values()) < 0.5:
        said = "fewer than half of the cells of any exercise are in it"
        raise ValueError(f"it is none of {', '.join(exercises)}: {said}")
    return max(shares, key=shares.get)


def restore(notebook, release):
    """The student's cells, with all that nbgrader needs taken from the release.

    A copy of a cell that checks is dropped from grading; a missing one is put back. A
    text in a cell of its own goes into the empty answer above it, or nobody would mark
    it. Returns the notebook, and the ids of the cells that were put back. Raises
    ValueError if an answer is there twice, since nobody can say which counts.
    """
    known = graded(release)
    names = [grade_id(cell, known) for cell in notebook.cells]
    answers = [x for x in known if known[x].metadata.nbgrader.solution]
    if twice := [name for name in answers if names.count(name) > 1]:
        raise ValueError(
            f"the cell {', '.join(twice)} is there more than once; delete the copies "
            "that should not count (or join the halves), and collect again"
        )
    missing = [name for name in known if name not in names]
    cells, left = [], dict(known)
    for cell, name in zip(notebook.cells, names, strict=True):
        like = left.pop(name, {"cell_type": cell.cell_type, "metadata": {}})
        fresh = nbformat.from_dict({"id": f"student-{len(cells)}", **like})
        fresh.source = cell.source.replace("\r\n", "\n")  # as Windows ends a line
        if fresh.cell_type == "code":
            fresh.outputs, fresh.execution_count = [], None
        elif "attachments" in cell:
            fresh.attachments = cell.attachments
        cells.append(fresh)
    ids = [None, *(cell.id for cell in known.values())]
    for name in missing:  # behind the one that it follows in the release
        before = ids[ids.index(known[name].id) - 1]
        place = [None, *(cell.id for cell in cells)].index(before)
        cells.insert(place, deepcopy(known[name]))
    theirs = {cell.source for cell in release.cells} | {""}
    for i, answer in enumerate(cells):
        if answer.cell_type == "code" or answer.id not in answers:
            continue
        below = takewhile(lambda cell: cell.id not in known, cells[i + 1 :])
        own = [x for x in below if x.cell_type != "code" and x.source not in theirs]
        if own and answer.source == known[answer.id].source:
            answer.source = own[0].source
            answer.attachments = own[0].get("attachments", {})
            cells.remove(own[0])
    restored = nbformat.v4.new_notebook(cells=cells, metadata=release.metadata)
    nbformat.validate(restored)
    return restored, missing


def student_of(inside: Path) -> str:
    """The folder that a file lies in, or what its name has before the first "_".

    As nbgrader's folder: letters, digits, and "-" for the rest. What Moodle adds goes:
    its number differs from one exercise to the next.
    """
    name, mark, _ = inside.stem.partition("_")
    if len(inside.parts) == 1 and not mark:
        raise ValueError(
            "nothing says whose it is; put it into a folder with the student's name, "
            "or name it STUDENT_anything.ipynb"
        )
    student = inside.parts[0] if len(inside.parts) > 1 else name
    student = re.sub(r"_\d+_assignsubmission_\w+$", "", student)
    student = unicodedata.normalize("NFC", student)
    if cleaned := re.sub(r"[^\w.-]+", "-", student).strip("-."):
        return cleaned
    raise ValueError(f"{student!r} has no letter or digit; rename it")


def place(text: str, target: Path, when: float):
    """Write a submission, and when it was: nbgrader grades anew what changed since.

    Raises ValueError if what is there came later.
    """
    when, stamp = datetime.fromtimestamp(when).astimezone(), target.parent / STAMP
    if not target.exists() or target.read_text("utf8") != text:
        if stamp.exists() and datetime.fromisoformat(stamp.read_text()) > when:
            raise ValueError(f"it is older than what counts, of {stamp.read_text()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf8")
        stamp.write_text(when.isoformat(" "))
        # Also where the answers are the same, and only the exercise was corrected
        marked = target.parents[3] / "autograded" / Path(*target.parts[-3:-1]) / STAMP
        marked.unlink(missing_ok=True)


def find(folder: Path, course: Path = COURSE) -> tuple[dict, list[str]]:
    """What is in a folder: (anybody's name in small letters, exercise) -> its files.

    Of each the path, the student, the restored text, and the cells that were put back.
    And a line for each file that is of no use, with the reason. Raises
    NotADirectoryError if there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; name the one to collect from")
    released = sorted((course / "release").glob("*/*.ipynb"))
    if not released:
        raise ValueError(f"{course} has no release; run exercises.release first")
    exercises = {path.stem: nbformat.read(path, as_version=4) for path in released}
    found, of_no_use = defaultdict(list), []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or any(x.startswith((".", "__MACOSX")) for x in inside.parts):
            continue
        try:
            student, data = student_of(inside), path.read_text("utf-8-sig")
            notebook = nbformat.reads(data, as_version=4)
            name = recognise(notebook, exercises)
            restored, missing = restore(notebook, exercises[name])
            text = nbformat.writes(restored) + "\n"
        except Exception as error:  # one odd file must not keep the others from it
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            of_no_use.append(f"{inside}: {kind}{error}")
        else:
            found[student.casefold(), name].append((inside, student, text, missing))
    return found, of_no_use


def collect(folder: Path, course: Path = COURSE) -> tuple[list[str], list[str]]:
    """Write `submitted/<student>/<exercise>/<exercise>.ipynb` for each file there is.

    Returns a line for each file that was placed, and for each that was not, with the
    reason.
    """
    (found, not_placed), placed = find(folder, course), []
    for (_, name), submitted in found.items():
        inside, student, text, missing = submitted[0]
        if len(submitted) > 1:
            listed = ", ".join(str(inside) for inside, *_ in submitted)
            said = f"{listed}: all of them are {name} by {student}; leave the one that"
            not_placed.append(f"{said} counts, or rename a student, and collect again")
        else:
            target = course / "submitted" / student / name / f"{name}.ipynb"
            note = f" (put back: {', '.join(missing)})" if missing else ""
            try:
                place(text, target, (folder / inside).stat().st_mtime)
                placed.append(f"{inside}: {name} by {student}{note}")
            except ValueError as error:
                not_placed.append(f"{inside}: {name} by {student}: {error}")
    return placed, not_placed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m exercises.collect")
    parser.add_argument("folder", type=Path, help="with the files that came back")
    placed, not_placed = collect(parser.parse_args().folder)
    for title, lines in (("placed", placed), ("NOT PLACED", not_placed)):
        print("\n  ".join([f"{title}: {len(lines)}", *lines]))
    sys.exit(1 if not_placed else 0)
