"""`python -m utils`: what it checks first, and what it says when a cell fails."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import ROOT, needs_posix
from utils.support import run
from utils.support.notebook import NOTEBOOKS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "1,5x"], "there is no notebook 5x; --only takes all, or num"),
        (["--set", "ppo_epoch=1"], "the nearest is 'ppo_epochs'"),
        (["--set", "ppo_epochs"], "FIELD=VALUE"),
        (["--set", "ppo_episodes=100"], "must be a multiple of ppo_rollout_size"),
        (["--preset", "small"], "invalid choice: 'small'"),
    ],
)
def test_a_bad_command_line_ends_before_anything_starts(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run.parse(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_set_reaches_the_kernel_and_only_is_in_order(monkeypatch):
    monkeypatch.setenv("RLHF_SEED", "7")
    options = run.parse(["--only", "3,1", "--set", "ppo_epochs=2"])
    assert options.notebooks == ["1-SFT.ipynb", "3-RLHF.ipynb"]
    assert run.parse([]).notebooks == [NOTEBOOKS[number] for number in "123"]
    assert run.parse(["--only", "all"]).notebooks == list(NOTEBOOKS.values())
    assert run.parse(["--only", "6,4"]).notebooks[0] == "more/4-Estimators.ipynb"
    assert options.env["RLHF_PPO_EPOCHS"] == "2"
    assert options.env["RLHF_PRESET"] == "tiny"
    assert (options.settings.ppo_epochs, options.settings.seed) == (2, 7)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose first notebook has the cells that the test gives."""

    def make(*sources):
        cells = [new_code_cell(source) for source in sources]
        nbformat.write(new_notebook(cells=cells), tmp_path / "1-SFT.ipynb")
        nbformat.write(new_notebook(), tmp_path / "3-RLHF.ipynb")
        monkeypatch.setattr(run, "ROOT", tmp_path)
        return tmp_path

    return make


def test_a_failing_cell_is_named(project, capsys):
    folder = project("good = 1", "bad = good / 0  # the culprit", "never = 'reached'")
    assert run.main(["--only", "1"]) == 1
    error = capsys.readouterr().err
    assert "1-SFT.ipynb failed" in error
    assert "bad = good / 0  # the culprit" in error
    assert "ZeroDivisionError" in error
    executed = nbformat.read(folder / "runs" / "tiny" / "1-SFT.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].ename == "ZeroDivisionError"


RUN = """
import sys
from pathlib import Path
from utils.support import run

run.ROOT = Path(sys.argv[1])
sys.exit(run.main(["--only", "1,3"]))
"""


@needs_posix
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_kernel_that_is_lost(project, survived, name):
    """Killed, or ended by Ctrl-C or by the system; in a process that may suffer."""
    # Ctrl-C reaches the command, which ends the kernel; a kill the kernel itself
    whom = "getpid" if name == "SIGKILL" else "getppid"
    source = f"import os, signal, time; os.kill(os.{whom}(), signal.{name})"
    folder = project("print('before')", source + "\ntime.sleep(100)")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (said,) = (line for line in done.stderr.splitlines() if "lost its kernel" in line)
    assert "1-SFT.ipynb lost its kernel" in said and "--only 1,3. PPO goes" in said
    executed = nbformat.read(folder / "runs" / "tiny" / "1-SFT.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "before\n"
    survived(f"python -m utils: the kernel ends by {name}", said)


SAVE_METRICS = """
import json, os, pathlib
folder = pathlib.Path("runs/tiny/sft")
folder.mkdir(parents=True)
loss = float(os.environ["RLHF_SFT_LR"])
metrics = {"before": {"validation_loss": 3.0}, "after": {"validation_loss": loss}}
(folder / "metrics.json").write_text(json.dumps(metrics))
print("done")
"""


def test_the_figures_end_in_a_table_and_the_outputs_can_be_saved(project, capsys):
    folder = project(SAVE_METRICS)
    arguments = ["--only", "1", "--set", "sft_lr=0.125", "--save-outputs"]
    assert run.main(arguments) == 0
    table = capsys.readouterr().out
    assert "SFT: validation loss [nats per token]" in table
    assert "3.000     0.125" in table
    assert '"validation_loss": 0.125' in (folder / "runs/tiny/metrics.json").read_text()
    saved = nbformat.read(folder / "1-SFT.ipynb", as_version=4)
    assert saved.cells[0].outputs[0].text == "done\n"
    assert "execution" not in saved.cells[0].metadata


def test_without_saving_the_notebook_is_left_alone(project):
    folder = project("print(1)")
    before = (folder / "1-SFT.ipynb").read_bytes()
    run.main(["--only", "1"])
    assert (folder / "1-SFT.ipynb").read_bytes() == before


def test_a_first_cell_that_asks_for_another_run_is_named(tmp_path, monkeypatch, capsys):
    """What stands in it would count, and the command would seem to have been heard."""
    for number, first in enumerate(
        ('PRESET = ""\nCHANGES = {"sft_epochs": 3}', 'PRESET = "full"\nCHANGES = {}')
    ):
        cell = nbformat.v4.new_code_cell(first, id="parameters")
        notebook = nbformat.v4.new_notebook(cells=[cell])
        nbformat.write(notebook, tmp_path / NOTEBOOKS["1"])
        monkeypatch.setattr(run, "ROOT", tmp_path)
        with pytest.raises(SystemExit):
            run.parse(["--only", "1"])
        said = capsys.readouterr().err
        assert ("{'sft_epochs': 3}", "'full'")[number] in said
        assert said.strip().endswith("use --preset and --set here")
    cell.source = 'PRESET = "tiny"\nCHANGES = {}'  # what the command asks for
    nbformat.write(notebook, tmp_path / NOTEBOOKS["1"])
    assert run.parse(["--only", "1"]).notebooks == [NOTEBOOKS["1"]]
