"""How nbgrader makes the student versions and grades what comes back."""

import os
from pathlib import Path

# nbgrader gives no points to a cell that writes to stderr, be it a warning only
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

c = get_config()  # noqa: F821  (nbgrader defines it)

c.CourseDirectory.course_id = "rlhf"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)

# A stub runs, and is wrong: its first lines stand outside the solution markers
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE"}
c.ClearSolutions.text_stub = "*Your answer here.*"

# The slowest cell of a right answer takes about 15 seconds; an endless loop is cut here
c.Execute.timeout = 90
