"""When one of several processes is lost: all end, soon, with a sentence, for real."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import ROOT, needs_posix
from utils.processes import check_gpus, join
from utils.support import run

pytest.importorskip("accelerate", reason="several processes need accelerate")

MEET = """
import os, pathlib
from utils.processes import gather, join, this_process
join("cpu")
processes = gather((os.getpid(), os.getppid()))
if not this_process():
    pathlib.Path("met.txt").write_text(" ".join(map(str, sum(processes, ()))))
"""
WAIT = "gather('the other one, for ever')"
SECOND = "if this_process(): "
FAULTS = {
    "one process raises": (
        SECOND + "raise ValueError('it rains')",
        "process 1 of 2 failed, so all were ended: 1-SFT.ipynb: it rains",
    ),
    "a kernel is killed": (
        SECOND + "os.kill(os.getpid(), 9)",
        "process 1 of 2 failed, so all were ended: 1-SFT.ipynb: Kernel died",
    ),
    "a process is killed": (
        SECOND + "os.kill(os.getppid(), 9)",
        "process 1 of 2 failed, so all were ended: Signal 9 (SIGKILL)",
    ),
}


@pytest.fixture
def project(tmp_path):
    """Starts two processes of a project whose first notebook has these cells."""
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    started = []

    def start(*cells):
        cells = [new_code_cell(source) for source in (MEET, *cells)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "1-SFT.ipynb")
        ours = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
        command = [sys.executable, "-m", "utils", "--processes", "2", "--only", "1"]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**ours, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def met(folder):
    """Kernels and their parents, as soon as they have met."""
    file, end = folder / "met.txt", time.monotonic() + 120
    while not (file.exists() and file.read_text().count(" ") == 3):
        assert time.monotonic() < end
        time.sleep(0.1)
    return [int(word) for word in file.read_text().split()]


def gone(pids):
    """Whether none of them is there any more, a few seconds from now at the latest."""

    def there(pid):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf8") as file:
                return file.read().split(") ")[1][0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + 20
    while any(map(there, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(there, pids))


@needs_posix
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_all_end_with_the_one_that_failed(project, tmp_path, survived, fault):
    cell, sentence = FAULTS[fault]
    process = project(cell, WAIT)
    pids = met(tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sentence in said
    assert "Traceback" not in said
    assert gone(pids)
    survived(f"two processes: {fault}", said[said.index("process 1 of 2") :])


@needs_posix
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_who_ends_the_command_ends_all_processes(project, tmp_path, survived, name):
    process = project(WAIT)
    pids = met(tmp_path)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode in (1, -signal.SIGKILL)
    assert gone(pids)
    if name != "SIGKILL":
        assert (
            said.strip().splitlines()[-1] == "interrupted; all 2 processes were ended"
        )
    survived(f"two processes: {name} to the command", "all are gone")


@pytest.mark.faults
@pytest.mark.slow
def test_a_port_in_use_is_another_ones_business(project, survived):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        process = project("gather('all of us')")
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    survived("two processes: accelerate's usual port is in use", "another is taken")


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        run.parse(["--processes", "2"])
    said = capsys.readouterr().err
    assert "2 processes would share 1 GPU of this machine; start at most 1" in said
    check_gpus(2, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "0"], "--processes must be 1 or more, got 0"),
        (["--processes", "2", "--only", "3,4"], "and --only has 4"),
        (["--processes", "3"], "ppo_minibatch_size (64) must be a multiple of the 3"),
    ],
)
def test_processes_that_cannot_be_started(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert message in capsys.readouterr().err


def test_without_accelerate_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr("utils.support.launch.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run.parse(["--processes", "2"])
    assert "pip install accelerate" in capsys.readouterr().err


def test_deepspeed_is_refused_in_a_sentence(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_DEEPSPEED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="take more/accelerate/fsdp2.yaml"):
        join("cpu")
