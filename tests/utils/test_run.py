"""`python -m utils`: what it checks first, what it hands to a kernel, how it ends."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import ROOT, needs_posix, python
from utils import __main__ as command
from utils.settings import NOTEBOOKS

BAD = {
    "--only 1,5x": "--only takes all, or some of 1,2,3,4,5,6,7,8,9, not {'5x'}",
    "--set ppo_epoch=1": "the nearest is 'ppo_epochs'",
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_bad_command_line_ends_before_anything_starts(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        command.parse(arguments.split())
    assert error.value.code == 2
    assert BAD[arguments] in capsys.readouterr().err


def test_only_says_which_notebooks_in_the_order_of_the_lessons():
    only = {"": "123", "--only 3,1": "13", "--only 6,4": "46", "--only all": NOTEBOOKS}
    for arguments, numbers in only.items():
        made, _ = command.parse(arguments.split())
        assert [str(x) for x in made] == [str(ROOT / NOTEBOOKS[n]) for n in numbers]


FIRST = 'PRESET = ""\nCHANGES = {}\nUSE_DRIVE = False'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose first notebook has the cells that the test gives."""

    def make(*sources, first=FIRST):
        cells = [new_code_cell(first, id="parameters"), *map(new_code_cell, sources)]
        for number in "13":
            nbformat.write(new_notebook(cells=cells), tmp_path / NOTEBOOKS[number])
        monkeypatch.setattr(command, "ROOT", tmp_path)
        return tmp_path

    return make


CELLS = [
    (FIRST, "--preset full", "full", {}),
    (FIRST, "--set seed=3 --set rm_epochs=2", "tiny", {"seed": 3, "rm_epochs": 2}),
    (FIRST, "--set positive_label=4,5", "tiny", {"positive_label": "4,5"}),
    # What the cell says stays where the command says nothing, however it says it
    ('PRESET = "full"\nCHANGES = {"seed": 7}', "", "full", {"seed": 7}),
    (FIRST + '\nCHANGES |= {"seed": 7}', "--set seed=8", "tiny", {"seed": 8}),
]


@pytest.mark.parametrize("first, asked, preset, changes", CELLS)
def test_the_first_cell_says_what_is_asked(
    project, monkeypatch, first, asked, preset, changes
):
    """And where neither it nor the command has a preset, the environment's is taken."""
    project(first=first)
    made, _ = command.parse(["--only", "1", *asked.split()])
    ((notebook, settings),) = made.values()
    exec(notebook.cells[0].source, executed := {})
    assert (executed["PRESET"], executed["CHANGES"]) == (preset, changes)
    assert (settings.preset, settings.changes) == (preset, changes)
    monkeypatch.setenv("RLHF_PRESET", "full")
    ((_, settings),) = command.parse(["--only", "1", *asked.split()])[0].values()
    assert settings.preset == "full"


SAVE_METRICS = """
import json, pathlib
folder = pathlib.Path("runs/tiny/sft")
folder.mkdir(parents=True)
loss = CHANGES["sft_lr"]
metrics = {"before": {"validation_loss": 3.0}, "after": {"validation_loss": loss}}
(folder / "metrics.json").write_text(json.dumps(metrics))
print("done")
"""


@pytest.mark.parametrize("save", [["--save-outputs"], []])
def test_the_figures_end_in_a_table_and_the_outputs_can_be_saved(project, capsys, save):
    file = project(SAVE_METRICS) / NOTEBOOKS["1"]
    before = file.read_bytes()
    assert not command.main(["--only", "1", "--set", "sft_lr=0.125", *save])
    assert "SFT: validation loss [nats per token]" in (said := capsys.readouterr().out)
    assert "3.000     0.125" in said
    first, cell = nbformat.read(file, as_version=4).cells
    assert first.source == FIRST  # its own, not what the command made of it
    if save:
        assert cell.outputs[0].text == "done\n" and "execution" not in cell.metadata
    else:
        assert file.read_bytes() == before


def test_a_failing_cell_is_named(project):
    folder = project("good = 1", "bad = good / 0  # the culprit", "never = 'reached'")
    with pytest.raises(SystemExit) as error:
        command.main(["--only", "1"])
    for said in ("1-SFT.ipynb failed", "bad = good / 0  # the culprit", "ZeroDivision"):
        assert said in error.value.code
    executed = nbformat.read(folder / "runs/tiny/1-SFT.ipynb", as_version=4)
    assert executed.cells[2].outputs[0].ename == "ZeroDivisionError"


RUN = """
import sys
from pathlib import Path
from utils import __main__ as command
command.ROOT = Path(sys.argv[1])
sys.exit(command.main(["--only", "1,3"]))
"""


@needs_posix
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_kernel_that_is_lost(project, name):
    """Killed, or ended by Ctrl-C; in a process that may suffer."""
    # Ctrl-C reaches the command, which ends the kernel; a kill the kernel itself
    whom = "getpid" if name == "SIGKILL" else "getppid"
    source = f"import os, signal, time; os.kill(os.{whom}(), signal.{name})"
    folder = project("print('before')", source + "\ntime.sleep(100)")
    done = python("-c", RUN, folder)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert said.startswith("1-SFT.ipynb lost its kernel") and "PPO goes on" in said
    executed = nbformat.read(folder / "runs/tiny/1-SFT.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "before\n"
