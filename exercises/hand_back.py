"""Marks and feedback for a platform: `python -m exercises.hand_back FOLDER [CSV]`.

A platform finds its students by the names that it gave to folders and files itself. So
feedback goes into archives where it is called as what came back, in FOLDER, and marks
into the gradebook that the platform exports, CSV.
"""

import argparse
import csv
import re
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from exercises.collect import COURSE, find


def archive(returned: Path, course: Path = COURSE) -> list[Path]:
    """Write `feedback-<exercise>.zip`, with a page beside each file that came back."""
    for old in course.glob("feedback-*.zip"):
        old.unlink()
    found, _ = find(returned, course)
    for (_, name), ((inside, student, *_), *others) in found.items():
        folder = course / "feedback" / student / name
        pages = [*folder.glob("*.html"), *folder.glob("not-graded.txt")]
        for page in () if others else pages:
            with ZipFile(course / f"feedback-{name}.zip", "a", ZIP_DEFLATED) as file:
                file.write(page, inside.with_suffix(page.suffix).as_posix())
    return sorted(course.glob("feedback-*.zip"))


def letters(name: str) -> str:
    """What is left of a name on every platform: neither case nor blanks nor signs."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFC", name)).casefold()


def enter(marks: Path, gradebook: Path) -> list[str]:
    """Write `filled-<gradebook>`: scores where student and exercise meet.

    A student's row has the name in one cell, or in two neighbours, to the left of all
    exercises; an exercise's column has its name in the title. Returns a line for each
    score that has not exactly one place of its own.
    """
    with gradebook.open(encoding="utf-8-sig", newline="") as file:
        sign = max(",;\t", key=file.readline().count)
        file.seek(0)
        head, *rows = csv.reader(file, delimiter=sign)
    with marks.open(encoding="utf8") as file:
        scores = [row for row in csv.DictReader(file) if row["score"]]
    places = {
        name: [i for i, title in enumerate(head) if name in title.casefold()]
        for name in {row["assignment"] for row in scores}
    }
    first = min(sum(places.values(), []), default=0)
    people = [[*row[:first], *map("".join, pairwise(row[:first]))] for row in rows]
    people = [set(map(letters, names)) for names in people]
    nowhere, taken = [], set()
    for score in scores:
        student, columns = letters(score["student_id"]), places[score["assignment"]]
        there = [i for i, names in enumerate(people) if student in names]
        place = (*there, *columns)
        if len(there) == len(columns) == 1 and place not in taken:
            rows[there[0]][columns[0]] = score["score"]
            taken.add(place)
        else:
            said = f"{len(there)} rows, {len(columns)} columns for it"
            said = "another one stands there" if place in taken else said
            nowhere.append(f"{score['student_id']}, {score['assignment']}: {said}")
    output = gradebook.with_name(f"filled-{gradebook.name}")
    with output.open("w", encoding="utf8", newline="") as file:
        csv.writer(file, delimiter=sign).writerows([head, *rows])
    return nowhere


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m exercises.hand_back")
    parser.add_argument("returned", type=Path, help="the folder that was collected")
    parser.add_argument("gradebook", type=Path, nargs="?", help="of the platform, CSV")
    parser.add_argument("--marks", type=Path, default=COURSE / "marks.csv")
    given = parser.parse_args()
    print("written:", *archive(given.returned))
    if given.gradebook:
        nowhere = enter(given.marks, given.gradebook)
        print("\n  ".join([f"NOT ENTERED: {len(nowhere)}", *nowhere]))
        sys.exit(bool(nowhere))
