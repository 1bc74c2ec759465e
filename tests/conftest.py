"""What the tests share: the tiny world, and one run of the series in it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
WINDOWS = ROOT / "tests" / "windows"  # mapped files refuse to be replaced, everywhere
runpy.run_path(str(WINDOWS / "sitecustomize.py"))
path = [str(WINDOWS), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(path)
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # on tensors this small more threads only wait for each other

from utils.practice import tiny_world  # noqa: E402

# In tests that kill a process
needs_posix = pytest.mark.skipif(
    not hasattr(os, "killpg"), reason="Windows has no SIGKILL, process group or fork"
)


def run_series(*arguments, cwd=ROOT, **environ):
    """`python -m utils` with these arguments, finished: on the CPU, nothing preset."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
    return subprocess.run(
        [sys.executable, "-m", "utils", *arguments],
        cwd=cwd,
        env={**ours, "CUDA_VISIBLE_DEVICES": "", **environ},
        capture_output=True,
        text=True,
    )


TOGETHER = ("1", "2", "3", "6")  # what the quick tests look at
REPORT = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def report(request):
    """`report(title, line)` prints a line under this title when all tests are done."""
    lines = request.config.stash.setdefault(REPORT, {})
    return lambda title, line: lines.setdefault(title, []).append(line)


@pytest.fixture
def survived(report):
    """`survived(fault, said)` enters a line into the table of faults."""
    title = "faults tried, and what is said or done"
    return lambda fault, said: report(title, f"{fault:58} {said.strip()[:230]}")


def pytest_terminal_summary(terminalreporter, config):
    for title, lines in config.stash.get(REPORT, {}).items():
        terminalreporter.section(f"{title} ({len(lines)})")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def world():
    """The folder of the tiny world."""
    torch.set_num_threads(THREADS)
    folder = tiny_world.build_world(ROOT / tiny_world.WORLD)
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="session")
def series(world, tmp_path_factory):
    """The folder of a run of notebooks 1, 2, 3 and 6 from an empty `runs/`.

    A slow test runs the others on its models.
    """
    runs = tmp_path_factory.mktemp("runs")
    what = ("--preset", "tiny", "--only", ",".join(TOGETHER))
    done = run_series(*what, RLHF_RUNS_DIR=str(runs))
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / "tiny", done.stdout
