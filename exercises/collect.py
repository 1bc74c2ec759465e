"""Sort submitted notebooks into nbgrader's folders: `python -m exercises.collect DIR`.

Files come back under other names ("Copy of 4-gae (1).ipynb"), and as Colab saves them:
without cell ids, in an older minor version of the format. So an exercise is recognised
by its cells, and everything around them is restored from the released notebook.
"""

import argparse
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import nbformat

COURSE = Path(__file__).parent
# What a computer adds to a folder without its owner's doing
LITTER = re.compile(r"(^|/)(\.|__MACOSX/|Thumbs\.db$|desktop\.ini$)")


class NotPlaced(ValueError):
    """A file that cannot be graded, and why."""


@dataclass
class Report:
    """What became of each file."""

    placed: list[str] = field(default_factory=list)
    not_placed: list[str] = field(default_factory=list)


def released(course: Path) -> dict:
    """The released notebooks by the name of their exercise."""
    files = sorted((course / "release").glob("*/*.ipynb"))
    if not files:
        raise FileNotFoundError(
            f"{course / 'release'} holds no exercise; run python -m exercises.release"
        )
    return {path.stem: nbformat.read(path, as_version=4) for path in files}


def grade_id(cell, known) -> str | None:
    """Which cell of the exercises this is: by nbgrader's id, or by the cell's own.

    Colab keeps a cell's id among its metadata.
    """
    marks = (cell.metadata.get("nbgrader") or {}).get("grade_id")
    for name in (marks, cell.metadata.get("id"), cell.get("id")):
        if name in known:
            return name
    return None


def graded(notebook) -> dict:
    """The cells of a released notebook that nbgrader knows, by their id."""
    return {
        cell.metadata.nbgrader.grade_id: cell
        for cell in notebook.cells
        if "nbgrader" in cell.metadata
    }


def read(path: Path):
    """A notebook, whatever wrote it. Raises NotPlaced if it is none."""
    data = path.read_bytes()
    if not data.strip():
        raise NotPlaced("it is empty; ask for it again")
    try:
        notebook = nbformat.reads(data.decode("utf-8-sig"), as_version=4)
        for cell in notebook.cells:
            cell.setdefault("metadata", nbformat.from_dict({}))
            if not isinstance(cell.source, str):
                raise TypeError("a cell has no text")
    except Exception as error:  # nbformat raises many kinds, and AttributeError
        kind = type(error).__name__
        raise NotPlaced(f"it is no notebook ({kind}); ask for it again") from None
    if not notebook.cells:
        raise NotPlaced("it has no cells; ask for it again")
    return notebook


def recognise(notebook, exercises: dict) -> str:
    """The exercise most of whose cells are there. Raises NotPlaced for no exercise."""

    def share(name):
        known = graded(exercises[name])
        ids = {grade_id(cell, known) for cell in notebook.cells} - {None}
        return len(ids) / len(known)

    best = max(exercises, key=share)
    if share(best) < 0.5:
        raise NotPlaced(
            f"it is none of {', '.join(exercises)}: fewer than half of the cells of "
            "any exercise are in it"
        )
    return best


def restore(notebook, release):
    """The student's cells, with all that nbgrader needs taken from the release.

    A copy of a cell that checks is dropped from grading; a missing one is put back.
    Returns the notebook, and the ids of the cells that were put back. Raises NotPlaced
    if an answer is there twice, since nobody can say which counts.
    """
    known = graded(release)
    ids = [grade_id(cell, known) for cell in notebook.cells]
    twice = [
        name
        for name, n in Counter(ids).items()
        if n > 1 and name and known[name].metadata.nbgrader.solution
    ]
    if twice:
        raise NotPlaced(
            f"the cell {', '.join(twice)} is there more than once; delete the copies "
            "that should not count (or join the halves), and collect again"
        )
    cells, seen = [], set()
    for cell, name in zip(notebook.cells, ids, strict=True):
        mine = name is not None and name not in seen
        kind = known[name].cell_type if mine else cell.cell_type
        fresh = nbformat.from_dict({"cell_type": kind, "metadata": {}})
        fresh.source, fresh.id = cell.source, f"student-{len(cells)}"
        if mine:
            fresh.metadata, fresh.id = known[name].metadata, known[name].id
            seen.add(name)
        if kind == "code":
            fresh.outputs, fresh.execution_count = [], None
        elif "attachments" in cell:
            fresh.attachments = cell.attachments
        cells.append(fresh)
    order = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in cells]
    before = None
    for name, cell in known.items():
        if name not in seen:
            place = order.index(before) + 1 if before else 0
            cells.insert(place, cell)
            order.insert(place, name)
        before = name
    restored = nbformat.v4.new_notebook(cells=cells, metadata=release.metadata)
    nbformat.validate(restored)
    return restored, [name for name in known if name not in seen]


def student_of(inside: Path) -> str:
    """The folder that a file lies in, or what its name has before the first "_"."""
    if len(inside.parts) > 1:
        return unicodedata.normalize("NFC", inside.parts[0])
    name, mark, _ = unicodedata.normalize("NFC", inside.stem).partition("_")
    if not mark:
        raise NotPlaced(
            "nothing says whose it is; put it into a folder with the student's name, "
            "or name it STUDENT_anything.ipynb"
        )
    return name


def as_folder(student: str) -> str:
    """The student's name as nbgrader's folder: letters, digits and "-" for the rest."""
    cleaned = re.sub(r"[^\w.-]+", "-", student).strip("-.")
    if not cleaned:
        raise NotPlaced(
            f"{student!r} has no letter or digit to name a folder by; rename it"
        )
    return cleaned


def place(text: str, target: Path):
    """Write a submission, and when: nbgrader grades anew what changed since."""
    if target.exists() and target.read_text("utf8") == text:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, "utf8")
    stamp = datetime.now().astimezone().isoformat(" ")
    (target.parent / "timestamp.txt").write_text(stamp)


def collect(folder: Path, course: Path = COURSE) -> Report:
    """Write `submitted/<student>/<exercise>/<exercise>.ipynb` for each file there is.

    Raises NotADirectoryError if there is no such folder, and FileNotFoundError if the
    exercises have not been released.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; name the one to collect from")
    exercises, report = released(course), Report()
    found, owners = defaultdict(list), {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if LITTER.search(inside.as_posix()) or path.is_dir():
            continue
        try:
            if not path.is_file():
                raise NotPlaced("it is no file (a broken link?); ask for it again")
            student = student_of(inside)
            name_of_folder = as_folder(student)
            owner = owners.setdefault(name_of_folder.casefold(), student)
            if owner != student:
                raise NotPlaced(
                    f"{student!r} and {owner!r} would share the folder "
                    f"{name_of_folder!r}; rename one of them"
                )
            notebook = read(path)
            name = recognise(notebook, exercises)
            restored, missing = restore(notebook, exercises[name])
            text = nbformat.writes(restored) + "\n"
            text.encode("utf8")
        except NotPlaced as error:
            report.not_placed.append(f"{inside}: {error}")
        except Exception as error:  # one odd file must not keep the others from it
            report.not_placed.append(f"{inside}: {type(error).__name__}: {error}")
        else:
            found[name_of_folder, name].append((inside, text, missing))
    for (student, name), files in found.items():
        if len(files) > 1:
            listed = ", ".join(str(inside) for inside, *_ in files)
            report.not_placed.append(
                f"{listed}: all of them are {name} by {student}; leave the one that "
                "counts, and collect again"
            )
            continue
        ((inside, text, missing),) = files
        place(text, course / "submitted" / student / name / f"{name}.ipynb")
        note = f" (put back: {', '.join(missing)})" if missing else ""
        report.placed.append(f"{inside}: {name} by {student}{note}")
    return report


def main() -> int:
    """Collect, and say what became of each file; 1 if any could not be placed."""
    parser = argparse.ArgumentParser(prog="python -m exercises.collect")
    parser.add_argument("folder", type=Path, help="with the files that came back")
    parser.add_argument("--course", type=Path, default=COURSE, help="of nbgrader")
    arguments = parser.parse_args()
    try:
        report = collect(arguments.folder, arguments.course)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    for title, lines in (("placed", report.placed), ("NOT PLACED", report.not_placed)):
        print(f"{title}: {len(lines)}")
        for line in lines:
            print("  " + line)
    return 1 if report.not_placed else 0


if __name__ == "__main__":
    sys.exit(main())
