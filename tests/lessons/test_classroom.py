"""What goes wrong in a classroom, done for real: `python -m pytest -m faults`."""

import contextlib
import hashlib
import json
import re
import shutil
import textwrap

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import ROOT, code_cells, needs_posix, ours, read, run_series
from utils.settings import NOTEBOOKS, STAGES

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def short(world):
    """Settings of a short run, whose few reviews teach the reward model nothing."""
    few = {"train_rows": 1600, "eval_prompts": 32, "normalise_samples": 64}
    few |= {"possible_samples": 8, "ppo_episodes": 1280, "ppo_rollout_size": 64}
    names = {"model_name": str(world / "model"), "dataset_name": str(world / "dataset")}
    return {**few, **names, "train_anyway": True}


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """The folder of the models of a run that nobody disturbed."""
    runs = tmp_path_factory.mktemp("whole")
    done = run_series(changes=short | {"runs_dir": runs})
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / "tiny"


def figures(folder, name="policy"):
    """What was measured, without the seconds; and a hash of the weights."""
    found = json.loads((folder / name / "metrics.json").read_text())
    found.pop("seconds", None)
    weights = (folder / name / "model.safetensors").read_bytes()
    return {**found, "weights": hashlib.sha256(weights).hexdigest()}


@pytest.fixture
def folder(whole, tmp_path):
    """Where a run of the models of the undisturbed run, which are there, writes."""
    for name in ("sft", "reward_model"):
        shutil.copytree(whole / name, tmp_path / "tiny" / name)
    return tmp_path / "tiny"


class Kernel:
    """A notebook in a kernel of its own, in which cells are run by their ids.

    Its settings stand in a cell below the first one, as papermill puts them.
    """

    def __init__(self, number, changes, stack):
        self.cells, path = code_cells(NOTEBOOKS[number]), {"path": str(ROOT)}
        self.ids = list(self.cells)
        notebook = new_notebook(cells=[])
        self.client = NotebookClient(notebook, resources={"metadata": path})
        stack.enter_context(self.client.setup_kernel(env=ours()))
        self.changes = f'PRESET, CHANGES = "tiny", {changes!r}'

    def run(self, *ids):
        for id in ids:
            self.client.nb.cells = [self.cells[id]]
            self.client.execute_cell(self.cells[id], 0)
            if id == "parameters":
                self.say(self.changes)

    def said(self, id):
        return "".join(output.get("text", "") for output in self.cells[id].outputs)

    def say(self, source):
        """Run this in a new cell; what it prints."""
        self.cells["new"] = new_code_cell(source)
        self.run("new")
        return self.said("new")


@pytest.fixture
def kernel(short, folder):
    """`kernel(number)` starts a `Kernel` for a short run of a notebook."""
    with contextlib.ExitStack() as stack:
        changes = short | {"runs_dir": str(folder.parent)}
        yield lambda number: Kernel(number, changes, stack)


@pytest.mark.parametrize("number, name", [*zip("123", STAGES, strict=True)])
def test_every_cell_can_be_run_twice(kernel, whole, folder, number, name):
    """And what is saved is what was saved before."""
    notebook = kernel(number)
    steps = [[id] for id in notebook.ids]
    if number == "3":  # from `start` to `checkpoint` is one step, as the page says
        start, end = (notebook.ids.index(id) for id in ("start", "checkpoint"))
        # and all before it may be run once more, before the loop
        steps[start : end + 1] = [notebook.ids[start : end + 1], notebook.ids[:start]]
    for ids in steps:
        notebook.run(*ids, *ids)
    assert figures(folder, name) == figures(whole, name)


KILL = """
import os
real_step, steps = run.optimizer.step, []
def step(**figures):
    steps.append(1)
    if len(steps) == 17 * 4 + 3:  # the policy has moved, and nothing is recorded
        os.kill(os.getpid(), 9)
    return real_step(**figures)
run.optimizer.step = step
"""


@needs_posix
def test_a_run_that_is_killed_goes_on(kernel, whole, folder):
    """And ends as if nothing had happened, to the last bit."""
    notebook = kernel("3")
    notebook.run(*notebook.ids[: notebook.ids.index("loop")])
    notebook.say(KILL)
    with pytest.raises(DeadKernelError):
        notebook.run("loop")
    notebook = kernel("3")
    notebook.run(*notebook.ids)
    assert "goes on after 16 of 20 rollouts" in notebook.said("checkpoint")
    assert figures(folder) == figures(whole)


LABELS = """rows = load_reviews(settings)["train"]
assert {row["sentence"][:4]: row["label"] for row in rows} == {"fine": 1, "dull": 0}"""


def test_every_recipe_does_what_it_says(kernel, whole, folder, world):
    """Each typed into a new cell where it says, and run on from there."""
    (text,) = (c.source for c in read(NOTEBOOKS["3"]).cells if c.id == "yours-text")
    found = re.findall(r"^\d\. \*\*(.+?)\*\*.*\n\n((?: {8}.*\n)+)", text, re.M)
    recipes = {title: textwrap.dedent(code) for title, code in found}
    notebook, expected = kernel("3"), figures(whole)
    ids = notebook.ids
    notebook.run(*ids)
    assert len(recipes) == 6 and figures(folder) == expected
    said = notebook.say(recipes["My own prompt"])
    assert said.count("my uncle thinks that the film") == 6
    assert re.findall(r"^(before|after) ", said, re.M) == ["before"] * 3 + ["after"] * 3
    notebook.say(recipes["Another curve"])
    assert "image/png" in str(notebook.cells["new"].outputs)
    # Another KL estimator: from the preflight on, and PPO begins anew
    notebook.say(recipes["Another KL estimator in the reward"])
    notebook.run(*ids[ids.index("start") :])
    assert figures(folder)["history"] != expected["history"]
    assert re.search("begins anew: .* other code", notebook.said("checkpoint"))
    # Negative instead of positive: below the cell that loads the reward model
    notebook.run("load")
    notebook.say(recipes["Negative instead of positive"])
    notebook.run(*ids[ids.index("load") + 1 :])
    judged = figures(folder)
    assert judged["after"]["judged_positive"] < judged["before"]["judged_positive"]
    # Another data set, another model: in the first cell
    rows = [f"fine {i},good\ndull {i},bad\n" for i in range(50)]
    csv = folder / "reviews.csv"
    csv.write_text("review,sentiment\n" + "".join(rows))
    for name, theirs, mine, shows in (
        ("My own data set", "reviews.csv", csv, LABELS),
        ("Another model", "distilgpt2", world / "model", "print(settings.model_name)"),
    ):
        source = recipes[name].replace(f'"{theirs}"', f'"{mine}"')
        notebook.say(f"{source}\n{notebook.cells['settings'].source}")
        said = notebook.say(shows)
    assert said.strip() == str(world / "model")


def test_a_learning_rate_that_explodes_is_said_and_nothing_is_lost(short, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    changes = short | {"runs_dir": folder.parent, "sft_lr": 1e30}
    done = run_series("--only", 1, changes=changes)
    assert done.returncode == 1
    says = "FloatingPointError: the loss is (nan|inf).* this step was not taken"
    assert re.search(says, done.stderr), done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
