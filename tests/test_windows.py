"""Nothing that was read stays mapped to its file, so that Windows lets it be replaced.

tests/conftest.py has every test, and all that it starts, refuse what Windows refuses.
"""

import dataclasses
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import work
from tests.conftest import ROOT
from tests.test_checkpoint import SETTINGS, Started, started
from tests.test_rollout import small_lm
from utils.data import load_tokenizer
from utils.models import RewardModel, load_causal_lm
from utils.support.artefacts import find_artefacts, save_artefact, write_text
from utils.support.checkpoint import read_state, write_state

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="what is imitated on Linux"),
]
REPLACE = {
    "rename": lambda file: file.rename(file.with_name("other")),
    "replace": lambda file: write_text(file, "new"),
    "delete": lambda file: file.unlink(),
    "move its folder": lambda file: file.parent.rename(file.parent.with_name("moved")),
    "delete its folder": lambda file: shutil.rmtree(file.parent),
}


def of(folder):
    """The files of this folder that are mapped into this process."""
    with open("/proc/self/maps") as lines:
        files = {line.split(maxsplit=5)[-1].strip() for line in lines}
    return [file for file in files if file.startswith(str(folder))]


@pytest.mark.parametrize("way", REPLACE)
def test_the_imitation_refuses_what_windows_refuses(tmp_path, way):
    file = tmp_path / "folder" / "weights"
    file.parent.mkdir()
    save_file({"w": torch.ones(3)}, file)
    tensors = load_file(file)
    with pytest.raises(PermissionError, match="a mapped file is in use"):
        REPLACE[way](file)
    assert tensors.pop("w").sum() == 3 and file.exists()
    REPLACE[way](file)


def test_what_tests_start_imitates_windows_too(tmp_path):
    """As the kernels of notebooks do."""
    source = (
        "from safetensors.torch import load_file, save_file\n"
        "import os, torch\n"
        "save_file({'w': torch.ones(3)}, 'file')\n"
        "w = load_file('file')\n"
        "os.unlink('file')\n"
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "PermissionError" in done.stderr


def test_a_checkpoint_that_was_read_can_be_replaced(tmp_path):
    file = tmp_path / "ppo.safetensors"
    write_state(file, {}, {"w": torch.arange(3.0)})
    _, state = read_state(file)
    assert not of(tmp_path)
    write_state(file, {}, {"w": state["w"] + 1})
    assert read_state(file)[1]["w"].tolist() == [1.0, 2.0, 3.0]


def test_a_run_that_goes_on_is_saved(tmp_path, survived, recwarn):
    """AdamW's moments keep the very tensors that were read."""
    settings = dataclasses.replace(SETTINGS, runs_dir=str(tmp_path))
    started(settings).go(until=2)
    run = Started(settings)
    assert len(run.history) == 2 and not of(tmp_path)
    run.go()
    assert (
        len(read_state(settings.folder / "ppo.safetensors")[1]["run"]["history"]) == 6
    )
    assert not [w for w in recwarn if "could not be saved" in str(w.message)]
    survived("Windows, imitated: saved after a restore", "all 6 rollouts are on disk")


def test_models_that_are_in_use_can_be_saved_anew(tmp_path, world, survived):
    """By the notebook that made them, while the models of the old files are alive."""
    settings = dataclasses.replace(SETTINGS, runs_dir=str(tmp_path))
    tokenizer = load_tokenizer(str(world / "model"))
    made = {"sft": small_lm(), "reward_model": RewardModel(small_lm().base_model)}
    for name, model in made.items():
        save_artefact(settings, name, model.float(), tokenizer, {"number": 1})
    folders = find_artefacts(settings, *made)
    alive = load_causal_lm(folders[0]), RewardModel.from_pretrained(folders[1])
    assert not of(tmp_path)
    for name, model in zip(made, alive, strict=True):
        save_artefact(settings, name, model, tokenizer, {"number": 2})
    tied = alive[0].get_input_embeddings().weight
    assert alive[0].get_output_embeddings().weight is tied
    assert {p.name for p in settings.folder.iterdir()} == set(made)
    survived(
        "Windows, imitated: models in use are saved anew", "the new ones are there"
    )


def test_the_benchmarks_know_memory_without_unixs_module(monkeypatch):
    """On Windows there is no `resource`; a Mac counts bytes where Linux counts KiB."""
    cpu, gib = torch.device("cpu"), 2**30
    usage = SimpleNamespace(ru_maxrss=3 * gib)
    unix = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr(work, "resource", unix)
    for platform, expected in (("darwin", 3), ("linux", 3 * 1024)):
        monkeypatch.setattr(work.sys, "platform", platform)
        assert work.peak_memory(cpu) == expected
    monkeypatch.setattr(work, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 * gib))
    monkeypatch.setattr(work.psutil, "Process", lambda: process)
    assert work.peak_memory(cpu) == 5


# What Windows lacks is taken away before pytest reads the tests, and after the
# libraries, which on Windows would have known
WITHOUT_UNIX = """
import os, signal, sys
from transformers import GPT2LMHeadModel
import datasets, nbclient, pytest
del os.killpg, os.fork, signal.SIGKILL
sys.modules["resource"] = None
import benchmarks.work
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_tests_that_kill_say_why_they_are_skipped_there():
    files = [f"tests/test_{name}.py" for name in ("artefacts", "checkpoint", "run")]
    options = ["-q", "-rs", "-m", "slow", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, *files, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 skipped" in done.stdout, done.stdout
    assert "Windows has no SIGKILL, process group or fork" in done.stdout
