"""Write the student versions of the exercises: `python -m exercises.release`.

nbgrader's `generate_assignment` for each source: it takes solutions, hidden tests and
outputs out, and enters the exercise in the gradebook, which autograding needs.
"""

import subprocess
import sys
from pathlib import Path

COURSE = Path(__file__).parent


def release(course: Path = COURSE):
    """Write `release/<exercise>/<exercise>.ipynb` for each source.

    Raises CalledProcessError if nbgrader refuses one; it has said why.
    """
    for source in sorted(course.glob("source/*/*.ipynb")):
        command = [sys.executable, "-m", "nbgrader", "generate_assignment", source.stem]
        subprocess.run([*command, "--force", "--create"], cwd=course, check=True)


if __name__ == "__main__":
    release()
