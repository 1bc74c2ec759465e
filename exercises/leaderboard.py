"""What changes of PPO are worth: `python -m exercises.leaderboard FOLDER`.

FOLDER holds capstones, as `exercises.collect` wants what comes back. The cell of each
runs with seeds of our own, in a throw-away copy of the library (`apart.py`), beside PPO
as it is. What fails is listed with its error, and never as a 0.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from exercises.apart import COURSE, ENVIRON, ROOT, copy_library, wall
from exercises.capstone import in_words
from exercises.collect import grade_id, student_of
from utils.runs import find_artefacts
from utils.settings import NOTEBOOKS, TINY

HANDED_OUT = COURSE / "capstone.ipynb"
HEAD = ["| what was changed | by | of what can be gained | CPU seconds | lines |"]
HEAD += ["|---|---|---:|---:|---:|"]


def way_of(path: Path) -> str:
    """The student's cell. Raises ValueError if there is not exactly one."""
    cells = nbformat.read(path, as_version=4).cells
    found = [cell.source for cell in cells if grade_id(cell, ["way"])]
    if len(found) != 1:
        said = f"it has {len(found)} cells with the id 'way', not 1"
        raise ValueError(f"{said}; put the cell into a notebook as it was handed out")
    return found[0]


def lines_changed(way: str) -> int:
    """How many lines of code are neither in the cell handed out nor in notebook 3."""
    cells = nbformat.read(ROOT / NOTEBOOKS["3"], as_version=4).cells
    known = "\n".join([way_of(HANDED_OUT), *(cell.source for cell in cells)])
    known = {line.strip() for line in known.splitlines()} | {""}
    own = {line.strip() for line in way.splitlines()} - known
    return sum(not line.startswith(("#", "WHAT =")) for line in own)


def measured(way: str, number: int, timeout: int) -> dict:
    """What a cell reaches with the seeds of this number, and what it says of itself.

    Raises RuntimeError, with its last words, if it fails or takes too long [seconds].
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder).resolve() / "repository"
        copy_library(copy)
        for made in (*find_artefacts(TINY, "sft", "reward_model"), "runs/tiny/world"):
            shutil.copytree(made, copy / made)
        (copy / "way.py").write_text(way, "utf8")
        command = [sys.executable, "-m", "exercises.capstone", "way.py", str(number)]
        how = {"capture_output": True, "text": True, "env": {**ENVIRON, **os.environ}}
        try:
            done = subprocess.run(
                [*wall(COURSE), *command], cwd=copy, timeout=timeout, **how
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took longer than {timeout} seconds") from None
        if not (found := copy / "way.json").exists():
            lines = f"it ended with status {done.returncode}\n{done.stderr}"
            raise RuntimeError(re.findall(r"^(?:[\w.]+Error\b|it ).*", lines, re.M)[-1])
        return json.loads(found.read_text())


def row_of(path: Path, who: str, number: int, timeout: int) -> tuple[float, str]:
    """The share of the best possible, and the row of a table, which is printed."""
    found = measured(way := way_of(path), number, timeout)
    what = " ".join(found["what"].replace("|", "/").split())
    shares, seconds = found["shares"], sum(found["seconds"]) / len(found["seconds"])
    cells = [what, who, in_words(shares), f"{seconds:.0f}", str(lines_changed(way))]
    print(row := f"| {' | '.join(cells)} |", flush=True)
    return sum(shares) / len(shares), row


def board(folder: Path, number: int = 0, timeout: int = 1800):
    """The rows, the best first, and a line for each capstone that has none."""
    rows, failed = [row_of(HANDED_OUT, "the project", number, timeout)], []
    for path in sorted(folder.rglob("*.ipynb")):
        inside = path.relative_to(folder)
        try:
            rows.append(row_of(path, student_of(inside), number, timeout))
        except Exception as error:  # one must not keep the others from the table
            failed.append(f"{inside}: {error}")
    return [row for _, row in sorted(rows, reverse=True)], failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m exercises.leaderboard")
    parser.add_argument("folder", type=Path, help="with the capstones")
    parser.add_argument("--number", type=int, default=0, help="whose seeds; default: 0")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each")
    parser.add_argument("--output", type=Path, help="a page, at whose end the table is")
    given = parser.parse_args()
    if not wall(COURSE):
        print("NO WALL: submissions have the network, and see the course by its path")
    rows, failed = board(given.folder, given.number, given.timeout)
    table = "\n".join([*HEAD, *rows, ""])
    print("\n".join([f"\n{table}", *(f"not measured: {line}" for line in failed)]))
    if given.output:
        old = given.output.read_text("utf8") if given.output.exists() else ""
        given.output.write_text(old.partition(HEAD[0])[0] + table, "utf8")
    sys.exit(bool(failed))
