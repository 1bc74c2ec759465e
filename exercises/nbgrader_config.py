"""How nbgrader makes the student versions and grades what comes back."""

import os
import sys
import warnings
from pathlib import Path

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE.parent))  # for `exercises` below, wherever nbgrader runs

from exercises.apart import ENVIRON  # noqa: E402

for setting in ENVIRON.items():
    os.environ.setdefault(*setting)
warnings.filterwarnings("ignore", "Object of type")  # SQLAlchemy's, about nbgrader

c = get_config()  # noqa: F821  (nbgrader defines it)

c.CourseDirectory.course_id = "rlhf"
c.CourseDirectory.root = str(COURSE)

# A stub runs, and is wrong: its first lines stand outside the solution markers
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE"}
c.ClearSolutions.text_stub = "*Your answer here.*"

# nbgrader's own steps, but for the first: a copy, no network, and what is to be said
steps = "IgnorePattern LimitOutput SaveAutoGrades AssignLatePenalties CheckCellMetadata"
steps = [f"nbgrader.preprocessors.{name}" for name in steps.split()]
steps.insert(1, "nbconvert.preprocessors.ClearMetadataPreprocessor")
c.Autograde.autograde_preprocessors = ["exercises.apart.Apart", *steps]
c.ExportApp.plugin_class = "exercises.grade.Marks"

# The slowest cell of a right answer takes about 15 seconds; an endless loop is cut here
c.Execute.timeout = 90
# A busy machine is slow to start a kernel, and to say that a cell was stopped
c.Execute.startup_timeout = 300
c.Execute.iopub_timeout = 30
