"""Rewards on the way: the formula, the notebook's cells, and the tool, pretended."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.test_rollout import EOS, small_lm
from tools import shaping
from utils.estimators import shaped_rewards
from utils.models import RewardModel, freeze
from utils.ppo import compute_gae, masked_whiten
from utils.practice import exact_world
from utils.settings import FULL, TINY
from utils.support.notebook import LOOP, NOTEBOOKS, import_cells

EXACT = {"atol": 1e-12, "rtol": 0}


@pytest.fixture(scope="module")
def cells():
    three = SimpleNamespace(**import_cells(NOTEBOOKS["3"], *LOOP))
    names = {"lesson3": three, "exact_world": exact_world}
    wanted = ("train-exactly", "scores-so-far", "shaped")
    return three, SimpleNamespace(**import_cells(NOTEBOOKS["4"], *wanted, names=names))


def test_what_a_response_earns_changes_by_the_first_potential_alone():
    generator = torch.Generator().manual_seed(0)
    rewards, potentials = torch.randn(2, 3, 4, generator=generator).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    potentials[mask == 0] = torch.nan
    found = shaped_rewards(rewards, potentials, mask)
    assert found[mask == 0].eq(0).all()
    total = (rewards * mask).sum(dim=1) - potentials[:, 0]
    torch.testing.assert_close(found.sum(dim=1), total, **EXACT)
    # and discounted: sum of gamma^t r_t
    found = shaped_rewards(rewards, potentials, mask, gamma=0.5)
    powers = 0.5 ** torch.arange(4)
    total = (powers * rewards * mask).sum(dim=1) - potentials[:, 0]
    torch.testing.assert_close((powers * found).sum(dim=1), total, **EXACT)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), potentials \(2, 4\)"):
        shaped_rewards(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3))


def test_a_beginning_is_scored_as_if_it_had_ended_there(cells):
    """Each text of its own, unpadded, with EOS behind."""
    three, four = cells
    torch.manual_seed(0)
    reward_model = freeze(RewardModel(small_lm().base_model))
    torch.nn.init.normal_(reward_model.head.weight)

    def score(ids, attention, mask):
        assert (mask.sum(dim=1) == mask.shape[1]).all() and (ids[:, -1] == EOS).all()
        raw = reward_model(ids, attention)
        return raw, 2 * raw + 1

    run = three.fresh_run(small_lm(), TINY)
    prompts, generator = [[3, 4], [5, 6, 7]] * 4, torch.Generator().manual_seed(1)
    models = (run.policy, run.policy.lm, score_zeros)
    rollout = three.collect_rollout(
        *models, prompts, EOS, dataclasses.replace(TINY, max_new_tokens=5), generator
    )
    assert len(rollout.lengths.unique()) > 1
    found = four.scores_so_far(rollout, score, EOS, TINY)
    assert found[rollout.mask == 0].eq(0).all()
    for i, prompt in enumerate(prompts):
        response = rollout.input_ids[i, -rollout.mask.shape[1] :].tolist()
        for t in range(int(rollout.lengths[i])):
            ids = torch.tensor([prompt + response[:t] + [EOS]])
            with torch.no_grad():
                alone = 2 * reward_model(ids, torch.ones_like(ids)) + 1
            assert found[i, t].item() == pytest.approx(alone.item(), abs=1e-4)


def score_zeros(input_ids, attention_mask, mask):
    """Nothing about a text: a raw score and a normalised one of 0."""
    return torch.zeros(len(input_ids)), torch.zeros(len(input_ids))


def test_the_advantages_are_those_of_the_shaped_rewards(cells):
    """All steps by hand, with values that are not 0; and not those of PPO alone."""
    three, four = cells
    torch.manual_seed(0)
    world = exact_world.ExactWorld(seed=4)
    own = dataclasses.replace(exact_world.SETTINGS, gae_lambda=0.9)
    run = three.fresh_run(exact_world.ExactWorld(seed=5).reference, own)
    torch.nn.init.normal_(run.policy.value_head.weight)
    models = (run.policy, world.reference, world.score)
    prompts, rest = [exact_world.PROMPT] * 64, (exact_world.EOS, own, run.generator)
    rollout = three.collect_rollout(*models, prompts, *rest)
    mask, values = rollout.mask, rollout.old_values
    found = four.shaped(world.score, exact_world.EOS)(rollout, own, 0.3)

    so_far = four.scores_so_far(rollout, world.score, exact_world.EOS, own)
    plain = three.ppo_advantages(rollout, own, 0.3)
    rewards = shaped_rewards(plain.rewards, so_far, mask)
    advantages, returns = compute_gae(rewards, values, mask, 1.0, 0.9)
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(found.rewards, rewards, **close)
    torch.testing.assert_close(found.returns, returns, **close)
    right = masked_whiten(advantages, mask)
    torch.testing.assert_close(found.advantages, right, **close)
    paid = found.rewards.sum(dim=1) - plain.rewards.sum(dim=1)
    torch.testing.assert_close(paid, -so_far[:, 0], **close)
    assert (found.advantages - plain.advantages).abs().max() > 0.1


def test_the_best_policy_stays_the_best(cells):
    _, four = cells
    world = exact_world.ExactWorld(seed=2)
    lm = four.train_exactly(world, 0.25, four.shaped(world.score, exact_world.EOS)).lm
    assert world.reached(lm, 0.25) > 0.98


@pytest.mark.slow
def test_a_bonus_without_the_difference_leads_elsewhere(cells, monkeypatch):
    """What the potential before a token is taken away for."""
    _, four = cells

    def bonus(rewards, potentials, mask, gamma):
        return shaped_rewards(rewards, potentials, mask, gamma) + potentials * mask

    monkeypatch.setitem(four.shaped.__globals__, "shaped_rewards", bonus)
    world = exact_world.ExactWorld(seed=2)
    lm = four.train_exactly(world, 0.5, four.shaped(world.score, exact_world.EOS)).lm
    assert world.reached(lm, 0.5) < 0.9


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that are done at once; the commands that were asked for."""
    commands = []

    def run(command, cwd, env):
        *_, preset, seed, way = command
        assert env["OMP_NUM_THREADS"] == "1" and cwd == tmp_path
        commands.append((preset, int(seed), way))
        ours, _ = shaping.settings_for(preset, int(seed), way)
        history = [{"score": 0.5, "kl": 1.0, "approx_kl": 0.01, "optimizer_steps": 3}]
        found = {"figures": {"share": int(seed) / 100}, "history": history}
        found |= {"seconds": 7.0, "rows": []}
        (tmp_path / ours.folder).mkdir(parents=True)
        (tmp_path / ours.folder / "found.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=0)

    def settings_of(seed, changes):
        theirs = dataclasses.replace(FULL, seed=seed, runs_dir=f"theirs/{seed}")
        return theirs, theirs

    for seed in (42, 43, 44):
        place = tmp_path / f"theirs/{seed}/full/policy"
        place.mkdir(parents=True)
        row = {"score": 0.1, "kl": 2.0, "approx_kl": 0.02, "optimizer_steps": 4}
        metrics = {"before": {"kl": 0.0}, "after": {"kl": 2.0}, "history": [row]}
        metrics["seconds"] = 9.0
        (place / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(shaping, "ROOT", tmp_path)
    monkeypatch.setattr(shaping.subprocess, "run", run)
    monkeypatch.setattr(shaping, "settings_of", settings_of)
    monkeypatch.setattr(shaping, "find_artefacts", lambda *names: names)
    return commands


def test_every_run_is_done_once_and_collected(pretended, tmp_path):
    shaping.main(["--jobs", "2", "--seeds", "3"])
    full = [("full", seed, "shaped") for seed in (42, 43, 44)]
    tiny = [("tiny", s, way) for way in ("PPO", "shaped") for s in range(5)]
    assert sorted(pretended) == sorted(full + tiny)
    shaping.main(["--seeds", "3"])
    assert len(pretended) == 13, "a run was done again"
    found = json.loads((tmp_path / shaping.RESULTS).read_text())
    assert list(found) == ["tiny", "real"]
    assert list(found["real"]) == ["PPO", "shaped"]
    shaped, ppo = found["real"]["shaped"], found["real"]["PPO"]
    assert shaped["figures"] == {"share": [0.42, 0.43, 0.44]}
    assert shaped["ended_early"] == [1, 1, 1] and ppo["ended_early"] == [0, 0, 0]
    assert shaped["loop_seconds"] == [7.0] * 3 and ppo["loop_seconds"] == [9.0] * 3
    assert ppo["before"] == {"kl": [0.0] * 3} and ppo["first_approx_kl"] == [0.02] * 3
    assert shaped["curves"] == {"score": [[0.5]] * 3, "kl": [[1.0]] * 3}
    assert found["tiny"]["PPO"]["figures"] == {"share": [0, 0.01, 0.02, 0.03, 0.04]}


def test_what_cannot_be_measured_is_said_first(pretended, monkeypatch, capsys):
    def nothing(seed, changes):
        raise FileNotFoundError("there is no cost; run python -m tools.real_run")

    monkeypatch.setattr(shaping, "settings_of", nothing)
    for arguments, said in (
        ([], "run python -m tools.real_run"),
        (["--jobs", "0"], "got --jobs 0"),
        (["--seeds", "1"], "got --seeds 1"),
    ):
        with pytest.raises(SystemExit):
            shaping.main(arguments)
        assert said in capsys.readouterr().err
    assert not pretended
    with pytest.raises(ValueError, match="way must be PPO or shaped, got 'shapd'"):
        shaping.main(["--one", "tiny", "0", "shapd"])
