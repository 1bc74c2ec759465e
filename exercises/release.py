"""Write the student versions of the exercises: `python -m exercises.release`.

What nbgrader's `generate_assignment` does, for all sources: it takes solutions, hidden
tests and outputs out, and enters the exercises in the gradebook, which autograding
needs. With `--to FOLDER`, a folder for students besides, in which there is no source.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from nbgrader.apps import NbGraderAPI
from traitlets.config.loader import PyFileConfigLoader

from exercises.apart import COURSE, copy_library


def nbgrader(course: Path) -> NbGraderAPI:
    """nbgrader's interface to a course, as its `nbgrader_config.py` sets it up."""
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
    return NbGraderAPI(config=config)


def release(course: Path = COURSE):
    """Write `release/<exercise>/<exercise>.ipynb` for each source.

    Raises RuntimeError, with nbgrader's words, if it refuses one.
    """
    # nbgrader calls a command that is installed beside Python
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ["PATH"]])
    for source in sorted((course / "source").glob("*/*.ipynb")):
        api = nbgrader(course)
        done = api.generate_assignment(source.stem, force=True, create=True)
        if not done["success"]:
            said = f"{done.get('error')} {done.get('log')}"
            raise RuntimeError(f"nbgrader refuses the exercise {source.stem}: {said}")
        print("written:", course / "release" / source.stem)


def hand_out(to: Path, repository: str = "", course: Path = COURSE):
    """Write the library and the released exercises into a folder, or a clone of one.

    All badges and setup cells then name `repository` ("owner/name"). Without one the
    exercises lose their badges, which would open the public texts, and the setup cells
    keep the library that they name. Raises FileExistsError if the folder has sources.
    """
    if (to / "exercises" / "source").exists():
        raise FileExistsError(f"{to} has sources in it; name a folder for students")
    copy_library(to)
    shutil.copytree(course / "release", to / "exercises/release", dirs_exist_ok=True)
    setup = (to / "1-SFT.ipynb").read_text("utf8")
    ours = re.search(r"REPOSITORY = .*github\.com/([\w./-]+)", setup)[1]
    for path in [*to.rglob("*.ipynb"), *to.rglob("README.md")]:
        text = path.read_text("utf8").partition("\n## For instructors")[0]
        if path.is_relative_to(to / "exercises") and not repository:
            text = re.sub(r"\n.*\[!\[Open In Colab.*\n.*", "", text)
        path.write_text(text.replace(ours, repository or ours), "utf8")
    print("written, without sources:", to)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m exercises.release")
    parser.add_argument("--to", type=Path, help="a folder for students")
    parser.add_argument("--repository", default="", help="where it will be: owner/name")
    given = parser.parse_args()
    release()
    if given.to:
        hand_out(given.to, given.repository)
