"""Rewards on the way, the exact KL: formulas, the notebook's cells, the tool."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.test_rollout import EOS, small_lm
from tools import real_adapters, shaping
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
    wanted = ("train-exactly", "scores-so-far", "shaped", "exactly-priced")
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


@pytest.fixture
def drawn(cells):
    """An exact world, and a rollout of another policy, with values that are not 0."""
    three, _ = cells
    torch.manual_seed(0)
    world = exact_world.ExactWorld(seed=4)
    own = dataclasses.replace(exact_world.SETTINGS, gae_lambda=0.9)
    run = three.fresh_run(exact_world.ExactWorld(seed=5).reference, own)
    torch.nn.init.normal_(run.policy.value_head.weight)
    models = (run.policy, world.reference, world.score)
    prompts, rest = [exact_world.PROMPT] * 64, (exact_world.EOS, own, run.generator)
    return world, own, run.policy, three.collect_rollout(*models, prompts, *rest)


def test_the_advantages_are_those_of_the_shaped_rewards(cells, drawn):
    """All steps by hand, with values that are not 0; and not those of PPO alone."""
    three, four = cells
    world, own, _, rollout = drawn
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


def test_the_kl_of_a_place_is_that_of_the_next_token(cells):
    _, four = cells
    torch.manual_seed(0)
    lm, reference = small_lm(), small_lm()
    torch.nn.init.normal_(reference.lm_head.weight, std=0.3)
    ids = torch.tensor([[0, 3, 4, 5, 6], [3, 4, 5, 6, 7]])
    attention = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = SimpleNamespace(texts=(ids, attention, mask), mask=mask)
    own = dataclasses.replace(TINY, temperature=0.5)
    found = four.kl_per_place(SimpleNamespace(lm=lm), reference, batch, own)
    assert found[0, 2] == 0
    for text, row, n in ((ids[0, 1:4], found[0], 2), (ids[1], found[1], 3)):
        one, other = (
            torch.distributions.Categorical(logits=x(text[None]).logits[0] / 0.5)
            for x in (lm, reference)
        )
        kl = torch.distributions.kl_divergence(one, other)
        torch.testing.assert_close(row[:n], kl[-n - 1 : -1], atol=1e-5, rtol=1e-4)
        assert kl.min() > 1e-3


def test_advantages_and_loss_together_have_the_gradient_of_the_kl(cells):
    """With scores of 0 nothing else is left: by sampling, beside the exact sum."""
    three, four = cells
    world, price = exact_world.ExactWorld(seed=4), 0.7
    own = dataclasses.replace(exact_world.SETTINGS, gae_lambda=1.0, value_coef=0.0)
    policy = three.fresh_run(exact_world.ExactWorld(seed=5).reference, own).policy
    weights = list(policy.lm.requires_grad_(True).parameters())
    new, old = world.logprobs(policy.lm), world.logprobs(world.reference).detach()
    kl = (new.exp() * (new - old)).sum()
    right = torch.cat([x.flatten() for x in torch.autograd.grad(kl, weights)])

    models = (policy, world.reference, score_zeros)
    prompts, generator = [exact_world.PROMPT] * 30_000, torch.Generator().manual_seed(1)
    rollout = three.collect_rollout(*models, prompts, exact_world.EOS, own, generator)
    later_places, priced_loss = four.exactly_priced(world.reference)
    loss, _ = priced_loss(policy, later_places(rollout, own, price), own)
    found = torch.autograd.grad(loss, weights)
    found = torch.cat([x.flatten() for x in found])
    # From a mean over tokens of whitened advantages to a sum in each response
    mask, k1 = rollout.mask.bool(), rollout.old_logprobs - rollout.ref_logprobs
    later = k1.flip(1).cumsum(1).flip(1) - k1
    unit = later[mask].std() * mask.sum() / len(mask)
    assert ((found * unit - right).norm() / right.norm()).item() < 0.05


def test_only_the_price_of_its_own_place_leaves_an_advantage(cells, drawn):
    """With values that are not 0, and scores; rewards and returns stay PPO's."""
    three, four = cells
    world, own, policy, rollout = drawn
    mask, values = rollout.mask, rollout.old_values
    later_places, priced_loss = four.exactly_priced(world.reference)
    found, plain = (
        later_places(rollout, own, 0.3),
        three.ppo_advantages(rollout, own, 0.3),
    )

    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(found.rewards, plain.rewards, **close)
    torch.testing.assert_close(found.returns, plain.returns, **close)
    A, _ = compute_gae(plain.rewards, values, mask, 1.0, 0.9)
    A = A + 0.3 * (rollout.old_logprobs - rollout.ref_logprobs)
    torch.testing.assert_close(found.advantages, masked_whiten(A, mask), **close)
    assert (found.advantages - plain.advantages).abs().max() > 0.01
    with torch.no_grad():
        loss, figures = priced_loss(policy, found, own)
        plain_loss, plain_figures = three.ppo_loss(policy, found, own)
        kl = four.kl_per_place(policy, world.reference, found, own)
    inside = mask.bool()
    price = 0.3 / A[inside].std(correction=0)
    assert (loss - plain_loss).item() == pytest.approx(
        (price * kl[inside].mean()).item(), rel=1e-4
    )
    assert figures.keys() == plain_figures.keys()


def test_the_best_policy_is_that_of_the_price(cells):
    """With notebook 3's clip range; a narrower one holds only the score's part back."""
    _, four = cells
    world = exact_world.ExactWorld(seed=7)
    how = four.exactly_priced(world.reference)
    lm = four.train_exactly(world, 0.25, *how, clip_range=0.2).lm
    assert world.reached(lm, 0.25) > 0.98


def test_each_way_has_its_settings_and_its_method(cells):
    three, four = cells
    sizes = {
        way: (own.ppo_rollout_size, own.ppo_lr)
        for way in shaping.WAYS
        for own in shaping.settings_for("tiny", 3, way)[:1]
    }
    usual = (TINY.ppo_rollout_size, TINY.ppo_lr)
    small = (128, 5e-4)
    ways = ("PPO", "shaped", "small rollouts", "exact KL")
    assert sizes == dict(zip(ways, (usual, usual, small, small), strict=True))
    vars(three).update(reference=None, score=None, eos_id=EOS)
    found = {way: shaping.method(way, three, four) for way in ways}
    assert found["PPO"] == found["small rollouts"] == (three.ppo_advantages, None)
    assert found["shaped"][0].__name__ == "dealt_out" and found["shaped"][1] is None
    names = [function.__name__ for function in found["exact KL"]]
    assert names == ["later_places", "priced_loss"]


def test_a_loss_that_is_not_ppos_reaches_the_update(monkeypatch):
    nothing, updates = SimpleNamespace(restore=lambda: None), []
    monkeypatch.setattr(real_adapters, "preflight", lambda *models: None)
    monkeypatch.setattr(real_adapters, "Checkpoint", lambda *parts: nothing)
    names = ("reference", "score", "eos_id", "reward_model", "tokenizer")
    three = SimpleNamespace(**dict.fromkeys((*names, "sft_responses")))
    three.prompts_of = lambda step: [[3]]
    three.collect_rollout = lambda *models: None
    three.ppo_update = lambda loss: loss
    three.train = lambda *parts: updates.append(parts[-2])
    run = SimpleNamespace(policy=None, optimizer=None, generator=torch.Generator())
    for loss in (None, "another"):
        real_adapters.train_checked(three, run, TINY, None, "reward", loss=loss)
        assert updates[-1]() is loss


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
        metrics = {"before": {"kl": 0.0}, "after": {"share": 0.7}, "history": [row]}
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
    tiny = [("tiny", s, way) for way, n in shaping.WAYS.items() for s in range(n)]
    assert sorted(pretended) == sorted(full + tiny)
    shaping.main(["--seeds", "3"])
    assert len(pretended) == 33, "a run was done again"
    found = json.loads((tmp_path / shaping.RESULTS).read_text())
    assert list(found) == ["tiny", "real", "exact"]
    assert list(found["exact"]) == ["PPO", "small rollouts", "exact KL"]
    assert len(found["exact"]["exact KL"]["figures"]["share"]) == 10
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
    with pytest.raises(ValueError, match="way must be PPO, .* got 'shapd'"):
        shaping.main(["--one", "tiny", "0", "shapd"])
