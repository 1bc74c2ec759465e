"""Write a repository's name into every badge and setup cell.

    python .github/rename.py you/yours

Whatever name stands there now is replaced; nothing else is changed.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BADGE = r"colab\.research\.google\.com/github/"
SETUP = r"REPOSITORY = \\\"https://github\.com/"  # with a notebook file's quotes
CITED = r"repository-code: \"https://github\.com/"
NAME = r"[\w.-]+/[\w.-]+"
PLACES = rf"({BADGE}|{SETUP}|{CITED}){NAME}?(?=/blob/|(?:\.git)?\\?\")"

if __name__ == "__main__":
    name = " ".join(sys.argv[1:])
    if not re.fullmatch(NAME, name):
        sys.exit(f"{name!r} is no OWNER/REPO: python .github/rename.py you/yours")
    files = ["git", "ls-files", "-z", "--", "README.md", "CITATION.cff", "*.ipynb"]
    for file in subprocess.check_output(files, cwd=ROOT, text=True).split("\0")[:-1]:
        old = (ROOT / file).read_bytes()  # bytes, so that line ends stay as they are
        new = re.sub(PLACES.encode(), rf"\g<1>{name}".encode(), old)
        if new != old:
            (ROOT / file).write_bytes(new)
