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


def release(course: Path = COURSE):
    """Write `release/<exercise>/<exercise>.ipynb` for each source.

    Raises RuntimeError, with nbgrader's words, if it refuses one.
    """
    # nbgrader calls a command that is installed beside Python
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ["PATH"]])
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
    for source in sorted((course / "source").glob("*/*.ipynb")):
        api = NbGraderAPI(config=config)
        done = api.generate_assignment(source.stem, force=True, create=True)
        if not done["success"]:
            said = f"{done.get('error')} {done.get('log')}"
            raise RuntimeError(f"nbgrader refuses the exercise {source.stem}: {said}")
        print("written:", course / "release" / source.stem)


if __name__ == "__main__":
    release()
