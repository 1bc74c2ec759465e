"""Write the student versions of the exercises: `python -m exercises.release`.

What nbgrader's `generate_assignment` does, for all sources: it takes solutions, hidden
tests and outputs out, and enters the exercises in the gradebook, which autograding
needs.
"""

import os
import sys
from pathlib import Path

from nbgrader.apps import NbGraderAPI
from traitlets.config.loader import PyFileConfigLoader

COURSE = Path(__file__).parent


def names(course: Path = COURSE) -> list[str]:
    """The exercises that have a source, in order."""
    return sorted(path.stem for path in (course / "source").glob("*/*.ipynb"))


def release(course: Path = COURSE) -> list[Path]:
    """Write `release/<exercise>/<exercise>.ipynb` for each source; the files written.

    Raises RuntimeError, with nbgrader's words, if it refuses one.
    """
    # nbgrader calls a command that is installed beside Python
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
    api, written = NbGraderAPI(config=config), []
    for name in names(course):
        done = api.generate_assignment(name, force=True, create=True)
        if not done["success"]:
            raise RuntimeError(
                f"nbgrader refuses the exercise {name}: {done.get('error')} "
                f"{done.get('log')}"
            )
        written.append(course / "release" / name / f"{name}.ipynb")
    return written


if __name__ == "__main__":
    for path in release():
        print("written:", path)
