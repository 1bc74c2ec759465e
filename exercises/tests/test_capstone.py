"""The capstone and its leaderboard, on models that have learnt nothing."""

import contextlib
import re
from types import SimpleNamespace

import nbformat
import pytest
import torch

from exercises import capstone, leaderboard
from exercises.tests.conftest import cell_of, put
from practice import tiny_world
from utils.data import load_tokenizer
from utils.models import RewardModel, load_causal_lm
from utils.runs import prepare, save_artefact

NOTEBOOK = nbformat.read(leaderboard.HANDED_OUT, as_version=4)
WAY = cell_of(NOTEBOOK, "way").source
FEW = {"ppo_episodes": 256, "ppo_rollout_size": 128, "ppo_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In it the notebooks 1 and 2 seem to have run."""
    folder = tmp_path_factory.mktemp("capstone")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_world.PRETRAINING, "steps", 20)
        settings, device = prepare("policy", "tiny")
        name, tokenizer = settings.model_name, load_tokenizer(settings.model_name)
        models = load_causal_lm(name, device), RewardModel.from_pretrained(name)
        for made, model in zip(("sft", "reward_model"), models, strict=True):
            save_artefact(settings, made, model, tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def lesson3(folder):
    few = {"possible_samples": 2, "eval_prompts": 16, "normalise_samples": 16}
    return capstone.begin(runs_dir=str(folder / "runs"), **few)


def test_a_policy_that_stands_still_has_gained_nothing(lesson3, monkeypatch):
    """Whatever its own price of KL; and the responses of the budget are enough."""
    monkeypatch.setattr(capstone, "BUDGET", 256)
    how = (lesson3.ppo_advantages, lesson3.ppo_update)
    changes = {**FEW, "ppo_lr": 1e-12, "kl_coef": 0.0}
    share, seconds = capstone.run_once(lesson3, 3, *how, changes)
    assert share == pytest.approx(0, abs=1e-5) and seconds > 0


def test_the_reward_model_reads_as_many_responses_as_ppo_s(lesson3, monkeypatch):
    """Those that are read besides count too; after the run anybody may ask."""
    monkeypatch.setattr(capstone, "BUDGET", 256)

    def advantages(rollout, *given):
        lesson3.score(*rollout.rows(torch.tensor([0])).texts)
        return lesson3.ppo_advantages(rollout, *given)

    with pytest.raises(ValueError, match="more than 256 responses; let the run"):
        capstone.run_once(lesson3, 3, advantages, lesson3.ppo_update, FEW)
    lesson3.measure_scores(lesson3.held_out * 9)


def test_what_cannot_be_compared_is_refused():
    """The settings on both sides of PPO's, and more responses than there may be."""
    changes = {"max_new_tokens": 4, "kl_coef": 1.0, "missing_eos_score": 0.0}
    says = "CHANGES has max_new_tokens, missing_eos_score, which is none of PPO's"
    with pytest.raises(ValueError, match=says):
        capstone.changed(capstone.TINY, changes)
    with pytest.raises(ValueError, match="is 15,360; it can be 7,680 at most"):
        capstone.changed(capstone.TINY, {"ppo_episodes": 15_360})
    assert capstone.changed(capstone.TINY, {"max_approx_kl": 1.0}).max_approx_kl == 1


def test_the_notebook_measures_before_and_after_with_the_student_s_seeds(
    monkeypatch, capsys
):
    seeds, gains = [], iter([0.1, 0.2, 0.3, 0.2, 0.4, 0.6])
    lesson3 = SimpleNamespace(ppo_advantages="advantages", ppo_update="update")
    monkeypatch.setattr(capstone, "begin", lambda: lesson3)

    def run_once(own, seed, advantages, update, changes):
        seeds.append((seed, advantages, update, changes))
        return next(gains), 1.0

    monkeypatch.setattr(capstone, "run_once", run_once)
    space = {}
    for cell in (x for x in NOTEBOOK.cells if x.cell_type == "code"):
        assert not cell.outputs
        if cell.id != "setup":
            exec(cell.source.replace("NUMBER = 1 ", "NUMBER = 5 "), space)
    theirs = [("advantages", "update", {}), (space["advantages"], "update", {})]
    assert seeds == [(seed, *how) for how in theirs for seed in (15, 16, 17)]
    # 0.1, 0.2 and 0.3: t = 4.303 with two degrees of freedom, s = 0.1
    assert capsys.readouterr().out.endswith("share: 20.0 ± 24.8 %\n")
    (lesson,) = (leaderboard.ROOT).glob("3-*.ipynb")
    ours = cell_of(nbformat.read(lesson, as_version=4), "ppo-advantages").source
    assert ours.replace("ppo_advantages", "advantages") in WAY


def test_the_board_ranks_what_ran_and_lists_what_did_not(tmp_path, monkeypatch):
    def capstone_with(*ways):  # as Colab saves it: the ids are in the metadata
        cells = [nbformat.v4.new_code_cell(x, metadata={"id": "way"}) for x in ways]
        return nbformat.v4.new_notebook(cells=cells)

    better = WAY.replace("CHANGES = {}", "# mine\nCHANGES = {'ppo_lr': 1e-3}")
    worse = f"{WAY}    \n\n    other = 1\n    other = 2\n\nWHAT = 'a | b\\nc'\n"
    put(tmp_path, capstone_with(better), "bob_capstone.ipynb")
    put(tmp_path, capstone_with(worse), "Ada L_9_assignsubmission_file/x.ipynb")
    put(tmp_path, capstone_with(WAY, WAY), "twice/x.ipynb")
    put(tmp_path, capstone_with("oh"), "zoe/x.ipynb")
    whats = {WAY: ("PPO", 0.8), better: ("a rate", 0.9), worse: ("a | b\nc", 0.1)}

    def measured(way, number, timeout):
        if way not in whats:
            raise RuntimeError(f"it fails with {number}, {timeout}")
        what, share = whats[way]
        return {"what": what, "shares": [share] * 3, "seconds": [1.0, 2.0, 6.0]}

    monkeypatch.setattr(leaderboard, "measured", measured)
    rows, failed = leaderboard.board(tmp_path, 7, 8)
    assert rows == [
        "| a rate | bob | 90.0 ± 0.0 % | 3 | 1 |",
        "| PPO | the project | 80.0 ± 0.0 % | 3 | 0 |",
        "| a / b c | Ada-L | 10.0 ± 0.0 % | 3 | 2 |",
    ]
    twice, zoe = failed
    assert twice.startswith("twice/x.ipynb: it has 2 cells with the id")
    assert zoe == "zoe/x.ipynb: it fails with 7, 8"


def test_the_public_board_has_a_row_for_each_capstone_that_lies_there():
    """If this fails: the command of docs/leaderboard.md, and commit what it writes."""
    page = (leaderboard.ROOT / "docs/leaderboard.md").read_text("utf8").splitlines()
    rows = [line.split(" | ")[0] for line in page if line[:2] == "| "]
    handed_in = [leaderboard.HANDED_OUT, *leaderboard.COURSE.glob("board/*.ipynb")]
    ways = map(leaderboard.way_of, handed_in)
    whats = [re.search('WHAT = "(.*)"', way)[1] for way in ways]
    assert sorted(rows[1:]) == sorted(f"| {what}" for what in whats)


def test_a_cell_is_measured_in_a_copy_and_its_last_words_are_kept(folder, monkeypatch):
    monkeypatch.chdir(folder)
    few = f"CHANGES = {FEW}\nprint('x' * 10_000)\n"
    few += "lesson3.settings = replace(lesson3.settings, possible_samples=2)"
    found = leaderboard.measured(f"{WAY}\n{few}", 0, 300)
    assert found["what"] == "nothing: PPO as it is"
    assert len(found["shares"]) == len(found["seconds"]) == 3
    assert not (folder / "way.py").exists()
    with pytest.raises(RuntimeError, match="^ArithmeticError: oh$"):
        leaderboard.measured("raise ArithmeticError('oh\\nno')", 0, 300)
    with pytest.raises(RuntimeError, match="^it took longer than 1 seconds$"):
        leaderboard.measured(WAY, 0, 1)
