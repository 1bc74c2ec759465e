"""Name the repository in every link: `python -m tools.badges OWNER/REPO`."""

import re
import sys

from utils.runs import NOTEBOOKS, ROOT

# Where a repository is named, whether as the placeholder or by its name.
PLACES = re.compile(
    r"(https://github\.com/|colab\.research\.google\.com/github/)"
    r"([\w.-]+/[\w.-]+?)(?=/blob/main/|\.git\b|\\\")"
)


def named_repositories() -> dict[str, set[str]]:
    """For the README and each notebook, the repositories that its links name."""
    exercises = sorted((ROOT / "exercises").glob("*/*/*.ipynb"))
    exercises = [path.relative_to(ROOT).as_posix() for path in exercises]
    return {
        file: {name for _, name in PLACES.findall((ROOT / file).read_text("utf8"))}
        for file in ("README.md", *NOTEBOOKS.values(), *exercises)
    }


def set_repository(name: str):
    """Write OWNER/REPO into every link. Raises ValueError if it is not of that form."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"the repository must be OWNER/REPO, got {name!r}")
    for file in named_repositories():
        text = (ROOT / file).read_text("utf8")
        (ROOT / file).write_text(PLACES.sub(rf"\g<1>{name}", text), "utf8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.badges OWNER/REPO")
    try:
        set_repository(sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
