"""Notebooks 1 to 3, executed in the tiny preset: their figures and their outputs."""

import io
import json
import math

import coverage
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from practice import tiny_world
from practice.cells import import_cells
from tests.conftest import ROOT, code_cells, ours, read
from utils.data import load_reviews, load_tokenizer, tokenize
from utils.settings import NOTEBOOKS, STAGES, load_settings

pytestmark = pytest.mark.slow  # it is the README's first command


@pytest.fixture(scope="module")
def metrics(series):
    files = {name: series[0] / name / "metrics.json" for name in STAGES}
    return {name: json.loads(file.read_text()) for name, file in files.items()}


@pytest.fixture(scope="module")
def settings(series):
    return load_settings("tiny", {"runs_dir": str(series[0].parent)})


def test_the_sft_model_is_close_to_what_the_grammar_leaves_open(settings, metrics):
    """Nats per token of the validation split: at most 5 % above the least there is."""
    tokenizer = load_tokenizer(settings.model_name)
    rows = tokenize(load_reviews(settings)["validation"]["sentence"], tokenizer, 66)
    kept = [row for row in rows if len(row) >= settings.sft_min_tokens]
    least = tiny_world.least_loss(settings, kept, tokenizer)["the grammar"]
    before, after = (metrics["sft"][when] for when in ("before", "after"))
    assert least < after["validation_loss"] < 1.05 * least
    assert after["validation_loss"] < before["validation_loss"] - 0.1


def test_the_reward_model_is_accurate_and_ppo_reaches_its_goal(metrics):
    """Also where no bands are known."""
    assert metrics["reward_model"]["after"]["accuracy"] >= 0.95
    before, after = metrics["policy"]["before"], metrics["policy"]["after"]
    assert before["exactly_positive"] == pytest.approx(0.45, abs=0.12)
    assert after["exactly_positive"] >= 0.8 and after["eos_rate"] >= 0.95
    assert before["kl"] == 0 and 0.3 < after["kl"] < 6


def test_the_history_is_healthy(metrics, settings):
    history = metrics["policy"]["history"]
    assert len(history) == settings.ppo_steps
    astray = import_cells(NOTEBOOKS["3"], "snapshot")["astray"]
    assert not any(astray(history[:n]) for n in range(1, len(history) + 1))
    assert history[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(history[0]["score"]) < 0.3  # normalised on the SFT model's samples
    assert sum(step["explained_variance"] for step in history[-10:]) > 0.5
    assert all(math.isfinite(value) for step in history for value in step.values())
    assert all(abs(step["ratio_mean"] - 1) < 0.1 for step in history)
    # a single odd minibatch may end an update, and no more than that
    assert sum(step["optimizer_steps"] < 16 for step in history) <= 2


def test_the_table_of_the_command(series):
    _, table = series
    assert "expected (mean ± 4 sd)" in table
    assert table.count("outside") <= 1, table  # of 13 figures; two are no accident
    for name in ("SFT: validation perplexity", "grammatical and positive, exactly"):
        (line,) = (line for line in table.splitlines() if line.startswith(name))
        assert len(line.split()) >= 8  # before, after, and what was expected


@pytest.mark.parametrize("number", "123")
def test_the_executed_copies_are_whole_and_quiet(series, number):
    for cell in code_cells(series[0] / NOTEBOOKS[number]).values():
        assert cell.execution_count
        for output in cell.outputs:
            assert output.get("name") != "stderr", output
            assert not [kind for kind in output.get("data", {}) if "widget" in kind]


def test_they_execute_most_of_utils(series):
    """What no lesson needs belongs into another room."""
    cover = coverage.Coverage(config_file=str(series[0].parent / "coveragerc"))
    cover.combine()
    share = cover.report(file=(table := io.StringIO()))
    assert "__main__" in table.getvalue() and share >= 85, table.getvalue()


@pytest.mark.parametrize("number", "578")
def test_a_lesson_runs_on_these_models_without_live_runs(series, number):
    """As the preset `full` has it; with a cell below the first one, as papermill's."""
    notebook, changes = read(NOTEBOOKS[number]), {"runs_dir": str(series[0].parent)}
    place = [cell.id for cell in notebook.cells].index("parameters") + 1
    chosen = f'PRESET, CHANGES, ROLLOUTS = "tiny", {changes}, 0'
    notebook.cells.insert(place, new_code_cell(chosen))
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=None, resources=where).execute(env=ours())
