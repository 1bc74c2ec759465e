"""Mark what was collected: `python -m exercises.grade [EXERCISE ...]`.

nbgrader marks, each submission apart from all else (`apart.py`). One that fails, or
from which a cell was cut, is marked once more: the machine may have been busy. What
fails again is listed, and never a 0.
"""

import argparse
import csv
import shutil
import sys
from pathlib import Path

from nbgrader.plugins import ExportPlugin

from exercises.apart import COURSE, CUT, note_of, wall
from exercises.release import nbgrader

COLUMNS = "student_id,assignment,timestamp,code,text,score,max_score,state"


def state_of(course: Path, student: str, exercise: str) -> str:
    """Whether a submission has marks, or why not, or why to look at it."""
    note = note_of(course, student, exercise)
    said = "; ".join(note.read_text("utf8").splitlines()) if note.exists() else ""
    if not (course / "autograded" / student / exercise).is_dir():
        return f"not graded: {said or 'see what nbgrader says'}"
    return f"look at this one: {said}" if said else "graded"


def mark(api, course: Path, student: str, exercise: str) -> str:
    """Let nbgrader mark a submission, twice if need be; its state."""
    feedback = course / "feedback" / student / exercise
    shutil.rmtree(feedback, ignore_errors=True)  # nbgrader writes what is not there
    for _ in range(2):
        note_of(course, student, exercise).unlink(missing_ok=True)
        done = api.autograde(exercise, student)
        state = state_of(course, student, exercise)
        if done["success"] and CUT not in state:
            return state
    if not done["success"]:
        feedback.mkdir(parents=True)
        (feedback / "not-graded.txt").write_text(state, "utf8")
    return state


def grade(exercises=(), timeout=None, again=False, course: Path = COURSE) -> dict:
    """Mark what is new or has changed: "student, exercise" -> its state.

    `timeout` is how long a cell may take, in seconds; `again` marks all anew. Raises
    FileNotFoundError if nothing was collected.
    """
    api, states = nbgrader(course), {}
    if timeout:
        api.config.Execute.timeout = timeout
    if not (collected := sorted((course / "submitted").glob("*/*/timestamp.txt"))):
        raise FileNotFoundError(f"{course} has no submissions; run exercises.collect")
    for stamp in collected:
        student, exercise = stamp.parts[-3:-1]
        old = course / "autograded" / student / exercise / stamp.name
        same = old.exists() and old.read_text() == stamp.read_text()
        if (not exercises or exercise in exercises) and (again or not same):
            print(".", end="", flush=True)
            states[f"{student}, {exercise}"] = mark(api, course, student, exercise)
    print()
    return states


class Marks(ExportPlugin):
    """What `nbgrader export` writes: no mark where nobody and nothing has marked."""

    def export(self, gradebook):
        """Write a row for each student and each exercise that anybody handed in."""
        course = Path(self.parent.coursedir.root)
        with open(self.to or "marks.csv", "w", newline="", encoding="utf8") as file:
            rows = csv.DictWriter(file, COLUMNS.split(","))
            rows.writeheader()
            for exercise in gradebook.assignments:
                there = {x.student.id: x for x in exercise.submissions}
                for student in gradebook.students if there else ():
                    row = {"student_id": student.id, "assignment": exercise.name}
                    row |= {"max_score": exercise.max_score, "state": "not handed in"}
                    if done := there.get(student.id):
                        state = state_of(course, student.id, exercise.name)
                        row |= {"timestamp": done.timestamp} | self._marks(done, state)
                    rows.writerow(row)

    def _marks(self, done, state) -> dict:
        if state.startswith("not graded"):
            return {"state": state}
        if done.needs_manual_grade:
            state = f"text not graded; {state}".removesuffix("; graded")
            return {"code": done.code_score, "state": state}
        score = max(0.0, done.score - (done.late_submission_penalty or 0))
        row = {"code": done.code_score, "text": done.written_score, "score": score}
        return row | {"state": state}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m exercises.grade")
    parser.add_argument("exercises", nargs="*", metavar="EXERCISE", help="default: all")
    parser.add_argument("--timeout", type=int, help="seconds that a cell may take")
    parser.add_argument("--again", action="store_true", help="mark all anew")
    if not wall(COURSE):
        print("NO WALL: submissions have the network, and see the course by its path")
    states = grade(**vars(parser.parse_args()))
    for who, state in sorted(states.items(), key=lambda item: item[::-1]):
        print(who, state, sep=": ")
    sys.exit(any(state.startswith("not graded") for state in states.values()))
