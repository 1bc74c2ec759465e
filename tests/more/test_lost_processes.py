"""When one of several processes is lost: all end, soon, with a sentence, for real."""

import json
import re
import signal
import subprocess
import sys

import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, needs_posix, ours

pytestmark = [pytest.mark.faults, pytest.mark.slow, needs_posix]


@pytest.fixture
def start():
    """Starts a module with these arguments; it is ended with the test."""
    started = []

    def begin(*words):
        command = [sys.executable, "-m", *map(str, words)]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environ = ours(OMP_NUM_THREADS="1")
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, **how))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def meet(start, what):
    command = start("tests.more.processes_at_work", what)
    pids = command.stdout.readline().split()
    assert len(pids) == 2, command.communicate()[1]
    return command, [psutil.Process(int(pid)) for pid in pids]


@pytest.mark.parametrize(
    "what, why",
    [("raises", "ValueError: it rains"), ("is killed", "Signal 9 (SIGKILL)")],
)
def test_all_end_with_the_one_that_failed(start, what, why):
    command, processes = meet(start, what)
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    _, said = command.communicate(timeout=60)
    reports = re.split(r"\n\[\d\]:", said)  # torchrun's, one of each process
    own = next(x for x in reports if re.search(r"rank +: 1 ", x))
    assert command.returncode == 1 and why in own


@pytest.mark.parametrize("name", ["INT", "TERM", "KILL"])
def test_who_ends_the_command_ends_all_processes(start, name):
    command, processes = meet(start, "waits")
    command.send_signal(getattr(signal, f"SIG{name}"))
    command.communicate(timeout=60)
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_one_process_goes_on_from_what_two_have_saved(start, series):
    """After 8 of 12 rollouts, and ends in a policy that has learnt."""
    sizes = {"ppo_rollout_size": 64, "ppo_episodes": 768, "runs_dir": series[0].parent}
    words = [word for x in sizes.items() for word in ("--set", "{}={}".format(*x))]
    two = start("more.processes", "--processes", 2, *words)
    next(line for line in two.stdout if " 9/12" in line)
    two.send_signal(signal.SIGINT)
    two.communicate(timeout=60)
    said, wrong = start("more.processes", "--processes", 1, *words).communicate()
    assert "PPO goes on after 8 of 12 rollouts" in said, wrong
    folder = series[0] / "policy_processes"
    history = json.loads((folder / "metrics.json").read_text())["history"]
    assert len(history) == 12
    assert history[-1]["score"] > history[0]["score"]
    AutoModelForCausalLM.from_pretrained(folder)
