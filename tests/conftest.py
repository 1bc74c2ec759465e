"""What the tests share: the tiny world, and one run of the series in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # on tensors this small more threads only wait for each other

from practice import tiny_world  # noqa: E402
from practice.cells import LOOP, import_cells  # noqa: E402

needs_posix = pytest.mark.skipif(
    not hasattr(os, "killpg"), reason="Windows has no SIGKILL, process group or fork"
)


def ours(**environ):
    """The environment of what tests start: on the CPU, no preset."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
    return {**rest, "CUDA_VISIBLE_DEVICES": "", **environ}


def python(*arguments, cwd=ROOT, **environ):
    """Python with these arguments, finished."""
    command, environ = [sys.executable, *map(str, arguments)], ours(**environ)
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


def run_series(*arguments, changes=None, **options):
    """`python -m utils` with these arguments and changed settings, finished."""
    sets = [x for name, y in (changes or {}).items() for x in ("--set", f"{name}={y}")]
    return python("-m", "utils", *arguments, *sets, **options)


def read(notebook):
    """A notebook, be it a path or one of the project's own names."""
    return nbformat.read(ROOT / notebook, as_version=4)


def code_cells(notebook) -> dict:
    return {cell.id: cell for cell in read(notebook).cells if cell.cell_type == "code"}


def refused(says, function, *arguments, **options):
    """What is said: one sentence that fits this expression, whatever it ends with."""
    with pytest.raises((ValueError, OSError, RuntimeError), match=says) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def network(monkeypatch):
    """Of the hub's client, which waits for half a second: no proxy is set."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    close_session()
    yield
    close_session()


@pytest.fixture(scope="session")
def loop():
    """PPO's loop as notebook 3 has it: its functions by their names."""
    return import_cells("3-RLHF.ipynb", *LOOP)


@pytest.fixture(scope="session")
def world():
    return tiny_world.build_world(ROOT / tiny_world.WORLD)


# Kernels that are slow to end are killed, so they save after each cell
SAVE = "import coverage\nsave = lambda result: coverage.Coverage.current().save()\n"
SAVE += "get_ipython().events.register('post_run_cell', save)\n"


@pytest.fixture(scope="session")
def series(world, tmp_path_factory):
    """The folder of a run of notebooks 1 to 3, and what it printed.

    Beside that folder lies which statements of `utils` it executed, kernels included:
    coverage starts in every Python that finds this variable.
    """
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(world, runs / "tiny" / "world")
    startup, measure = runs / "profile_default" / "startup", runs / "coveragerc"
    startup.mkdir(parents=True)
    (startup / "save.py").write_text(SAVE)
    files = f"source = {ROOT / 'utils'}\ndata_file = {runs / 'executed'}\n"
    measure.write_text(f"[run]\nparallel = true\n{files}")
    environ = {"IPYTHONDIR": str(runs), "COVERAGE_PROCESS_START": str(measure)}
    done = run_series("--preset", "tiny", changes={"runs_dir": runs}, **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / "tiny", done.stdout
