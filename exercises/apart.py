"""Where a submission runs while it is marked: in a copy of the library, by itself.

nbgrader calls this (`nbgrader_config.py` names it), from the command line and from the
formgrader alike. What a person should know of a submission goes into
`notes/<student>/<exercise>.txt`, a sentence a line.
"""

import builtins
import contextlib
import functools
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_output
from nbgrader.preprocessors import Execute

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
LIBRARY = r"utils|practice|more|workshop|tests|docs|exercises|[123]-.*\.ipynb|LICENSE"
LIBRARY += r"|(READ|CONTRIB)\w+\.md|requirements\.txt|(pytest|ruff)\..*|\.\w+(ore|ter)"
CUT = "took longer than"

# Set before a kernel starts: bars and warnings are noise, one thread is enough, those
# that wait leave the cores to others, and nothing is fetched or left behind
ENVIRON = "TQDM_DISABLE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1"
ENVIRON += " OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=1"
ENVIRON = dict(setting.split("=") for setting in ENVIRON.split())

# What reaches behind the checks, or out of the notebook: no exercise needs it
ODD = r"(?<![\w.])(setattr|delattr|exec|eval|globals|vars|open|__import__)\("
ODD += r"|^ *(!|%+(ba)?sh\b|%+(run|sx|system|writefile|load|cat)\b)"
ODD += r"|\b(builtins|importlib|inspect|subprocess|ctypes|socket|nbgrader)\b|\.glob\("
ODD += r"|sys\.modules|__(builtins|dict|code|globals|bool)__|\.system\(|\.popen\("
ODD += r"|\.(read|write)_\w+\(|exercises[/\\.]|source[/\\]|gradebook|\.ipynb"
ODD += r"|\b(torch|practice)(\.\w+)+ *=(?!=)"


def note_of(course: Path, student: str, exercise: str) -> Path:
    """The file with what a person should know of a submission."""
    return course / "notes" / student / f"{exercise}.txt"


def copy_library(to: Path):
    """Write what an exercise needs to run: all but sources, tests and gradebook."""
    kept = {ROOT: LIBRARY, COURSE: r"__init__\.py|(museum|capstone)\.\w+|README\.md"}

    def left_out(folder, names):
        of_ours = kept.get(Path(folder), r"(?!__pycache__|\.ipynb_checkpoints).*")
        return [name for name in names if not re.fullmatch(of_ours, name)]

    shutil.copytree(ROOT, to, ignore=left_out, dirs_exist_ok=True)


def contents(folder: Path) -> dict:
    """A hash of each file, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


@functools.cache
def wall(course: Path) -> list[str]:
    """What stands before a command that shall have no network and not see the course.

    Nor can it write into the repository. Empty where the system does not permit this.
    """
    root, *hidden = (shlex.quote(str(x)) for x in (ROOT, COURSE, course, ROOT / ".git"))
    steps = f"mount --bind {root} {root} && mount -o remount,bind,ro {root}"
    for folder in hidden:
        steps += f" && if [ -d {folder} ]; then mount -t tmpfs none {folder}; fi"
    prefix = ["unshare", "-rnm", "sh", "-c", f'{steps} && exec "$@"', ""]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*prefix, "true"], capture_output=True, check=True)
        return prefix
    return []


def suspicions(notebook) -> list[str]:
    """The student's lines that reach for the checks, or out of the notebook."""
    code = {True: "", False: ""}
    for cell in (x for x in notebook.cells if x.cell_type == "code"):
        locked = cell.metadata.get("nbgrader", {}).get("locked", False)
        code[locked] += f"{cell.source}\n"
    made = re.findall(r"^(?:def|class|from \S+ import) (\w+)", code[True], re.M)
    called = "|".join(made + re.findall(r"\.(\w+)\(", code[True]))
    names = "|".join(made + dir(builtins))
    odd = rf"{ODD}|\.({called}) *=(?!=)|\b(global|as) (.*, *)?({names})\b"
    odd += rf"|^(def|class) ({names})\b|^(\w+, *)*({names})(, *\w+)* *=(?!=)"
    lines = code[False].splitlines()
    return [f"has the line {x.strip()!r}" for x in lines if re.search(odd, x)]


class Apart(Execute):
    """nbgrader's `Execute`, in a throw-away copy of the library.

    Output on stderr counts as output; a cell that took too long says so.
    """

    def preprocess(self, nb, resources, km=None):
        """Execute the notebook, and note what a person should look at.

        Raises what nbclient raises if the kernel dies, does not start or does not stop.
        """
        course, who = Path.cwd(), resources["nbgrader"]
        note = note_of(course, who["student"], who["assignment"])
        note.parent.mkdir(parents=True, exist_ok=True)
        self.said, self.name = suspicions(nb), "its first cell"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.folder, self.wall = Path(folder).resolve(), wall(course)
            copy_library(copy := self.folder / "repository")
            before = contents(copy)
            apart = {**resources, "metadata": {"path": str(copy / "exercises")}}
            try:
                nb, _ = super().preprocess(nb, apart, km)
            except Exception as error:
                why = f"{type(error).__name__} at {self.name}: {error}"
                if isinstance(error, DeadKernelError):
                    why = f"the kernel ended in {self.name}, or just before (exit()?)"
                self.said = [" ".join(why.split())[:300]]
                raise
            finally:
                after = contents(copy)
                for path in sorted(before.keys() | after.keys()):
                    if before.get(path) != after.get(path):
                        self.said.append(f"wrote {str(path.relative_to(copy))!r}")
                note.write_text("".join(f"{line}\n" for line in self.said), "utf8")
        return nb, resources

    def create_kernel_manager(self):
        """nbclient's, behind the wall; its sockets are files, which pass it."""
        km = super().create_kernel_manager()
        if self.wall:
            km.transport, km.ip = "ipc", str(self.folder / "kernel")
            km.kernel_spec.argv[:1] = [*self.wall, sys.executable]
        return km

    def preprocess_cell(self, cell, resources, index):
        """Execute the cell, and keep from its output what costs points in silence."""
        mark = cell.metadata.get("nbgrader", {})
        self.name = f"the cell {mark.get('grade_id', index + 1)}"
        cell, resources = super().preprocess_cell(cell, resources, index)
        outputs = cell.get("outputs", [])
        for output in outputs:
            if output.output_type == "stream":  # nbgrader gives no points for stderr
                output.name = "stdout"
        if "CellTimeoutError" in [output.get("ename") for output in outputs]:
            said = f"this cell {CUT} {self.timeout} seconds, and was stopped"
            fault = {"ename": "TimeoutError", "evalue": said, "traceback": [said]}
            kept = [x for x in outputs if x.output_type != "error"]
            cell.outputs = [*kept, new_output("error", **fault)]
            self.said.append(f"{self.name} {CUT} {self.timeout} seconds")
        return cell, resources
