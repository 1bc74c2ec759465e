"""PPO where every answer is known: three words, fifteen responses, exact sums."""

import itertools

import pytest
import torch

from practice import exact_world
from practice.cells import import_cells
from utils.ppo import compute_gae, token_logprobs, token_rewards
from utils.settings import NOTEBOOKS

BETAS = (0.25, 0.5, 1.0)
CELLS = ("loop", "train-exactly", "whole-response", "grpo-policy-loss", "ways")
CELLS += ("exact-path",)
EXACT = {"atol": 1e-9, "rtol": 0}


@pytest.fixture
def world():
    world = exact_world.ExactWorld(seed=3)
    world.reference.double()
    world.scores = world.scores.double()
    return world


def test_all_responses_are_there_and_their_probabilities_add_up(world):
    ids, mask = exact_world.all_responses()
    rows = [ids[b, : int(m.sum())].tolist() for b, m in enumerate(mask)]
    every = (list(words) for words in itertools.product(range(3), repeat=3))
    cut = [words[: words.index(0) + 1] if 0 in words else words for words in every]
    assert sorted(rows) == sorted(map(list, set(map(tuple, cut)))) and len(rows) == 15
    assert ids[mask == 0].eq(exact_world.EOS).all()
    logprobs = world.logprobs(world.reference)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for row, logprob in zip(rows, logprobs, strict=True):
        text = torch.tensor([exact_world.PROMPT + row])
        alone = token_logprobs(world.reference(text).logits[:, :-1], text[:, 1:])
        assert logprob.item() == pytest.approx(alone.sum().item(), abs=1e-9)


def test_scores_are_found_again_and_a_missing_eos_costs(world):
    scores, _ = world.score(world.input_ids, None, world.mask)
    assert torch.equal(scores, world.scores) and len(scores.unique()) == 7 + 1
    names = dict(zip(world.names(), scores.tolist(), strict=True))
    assert {"EOS", "b EOS", "a b EOS", "b a a …"} < names.keys()
    without = {score for name, score in names.items() if name[-1] == "…"}
    assert without == {exact_world.SETTINGS.missing_eos_score}
    # responses may all be short: the batch is then narrower than three slots, and
    # what stands behind an end is nothing
    ids, mask = torch.tensor([[0, 2, 0], [0, 0, 1]]), torch.tensor([[1, 1], [1, 0]])
    assert world.score(ids, None, mask)[0].tolist() == [names["b EOS"], names["EOS"]]


@pytest.mark.parametrize("beta", BETAS)
def test_the_optimum_is_the_optimum(world, beta):
    """J* - J(pi) = beta KL(pi || pi*) for every pi: no policy is better."""
    log_best, J_best = world.optimum(beta)
    assert log_best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(world.objective(log_best, beta), J_best, **EXACT)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = 3 * torch.randn(15, generator=generator, dtype=torch.float64)
        logprobs = logits.log_softmax(0)
        gap = beta * (logprobs.exp() * (logprobs - log_best)).sum()
        assert gap > 0
        J = world.objective(logprobs, beta)
        torch.testing.assert_close(J_best - J, gap, **EXACT)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_with_exact_values_no_state_has_an_advantage(world, lam):
    """E[A_t | what was written] = 0 at every state, whatever lambda is."""
    lm = exact_world.ExactWorld(0).reference.double()  # another policy
    with torch.no_grad():
        logprobs, ref = world.token_logprobs(lm), world.token_logprobs(world.reference)
        rewards = token_rewards(world.scores, logprobs, ref, world.mask, 0.4)
        values = world.values(lm, 0.4)
        start = world.objective(world.logprobs(lm), 0.4)
        # J is the mean of all rewards, and the value before the first token
        mean = (world.logprobs(lm).exp() * rewards.sum(dim=1)).sum()
    torch.testing.assert_close(
        torch.stack([mean, values[0, 0]]), start.expand(2), **EXACT
    )
    advantages, _ = compute_gae(rewards, values, world.mask, 1.0, lam)
    probs, states = logprobs.sum(dim=1).exp(), {}
    for i, t in world.mask.nonzero().tolist():
        states.setdefault((t, *world.responses[i, :t].tolist()), []).append(i)
    assert len(states) == 7  # before the first token, two words later, four later
    for (t, *_), here in states.items():
        mean = (probs[here] * advantages[here, t]).sum()
        assert mean.item() == pytest.approx(0, abs=1e-9)
        assert advantages[here, t].abs().max() > 1e-2


def learn(beta, seed, name="PPO"):
    """What an estimator reaches in one world, as a share of what there is to gain."""
    lesson = import_cells(NOTEBOOKS["5"], *CELLS)
    advantages, update, own = lesson["ways"](4)[name]
    world, how = exact_world.ExactWorld(seed), (advantages, update)
    run = lesson["train_exactly"](world, beta, *how, **{"seed": seed, **own})
    return world.reached(run.lm, beta)


def test_the_picture_moves_as_ppo_does():
    """Its last policy is the one that the loop finds."""
    lesson, changes = import_cells(NOTEBOOKS["5"], *CELLS), {"clip_range": 0.3}
    changes |= {"gae_lambda": 0.0, "ppo_lr": 1e-2}
    world, path = lesson["exact_path"](0.25, "PPO", rollouts=2, **changes)
    advantages, *_ = lesson["ways"](4)["PPO"]
    changes["ppo_episodes"] = 2 * exact_world.SETTINGS.ppo_rollout_size
    lm = lesson["train_exactly"](world, 0.25, advantages, **changes).lm
    assert len(path) == 3 and torch.equal(path[0], world.logprobs(world.reference))
    assert torch.equal(path[2], world.logprobs(lm).detach())
    assert not torch.equal(path[1], path[0])
    kl = sum(p.exp() * (p - ref) for p, ref in zip(path[2], path[0], strict=True))
    said = f"2 of 2,  KL {kl:.2f} nats,  {world.reached(lm, 0.25):.1%} of what"
    figure = lesson["plot_policy"](world, path, 0.25, 2)
    assert said in figure.axes[0].get_title(loc="left")


SLOW = [pytest.param(beta, range(10), marks=pytest.mark.slow) for beta in BETAS]


@pytest.mark.parametrize("beta, seeds", [(0.5, [0]), *SLOW])
def test_ppo_finds_the_optimum(beta, seeds):
    shares = [learn(beta, seed) for seed in seeds]
    assert min(shares) >= 0.98, shares


@pytest.mark.slow
def test_rloo_finds_it_too_and_the_others_come_near():
    """On the same loop, in one world: GRPO is after something else, so less."""
    reached = {name: learn(0.5, 0, name) for name in ("REINFORCE", "RLOO", "GRPO")}
    assert reached["RLOO"] >= 0.98
    assert reached["REINFORCE"] >= 0.8
    assert 0.5 <= reached["GRPO"] < reached["RLOO"]


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_n_is_what_all_draws_of_n_give(n):
    """Each of the 15^n in the exact world, where eight responses score the same."""
    best_of_n = import_cells(NOTEBOOKS["7"], "best-of-n")["best_of_n"]
    world = exact_world.ExactWorld(seed=3)
    ref, scores = world.logprobs(world.reference).detach(), world.scores
    expected = torch.zeros(15, dtype=torch.float64)
    for drawn in itertools.product(range(15), repeat=n):
        # Of equal ones the first: they come in any order
        best = max(drawn, key=lambda i: scores[i].item())
        expected[best] += ref[list(drawn)].sum().exp()
    # Of several prompts at once, each is as it is alone
    rows = best_of_n(torch.stack([ref.flip(0), ref]), torch.stack([-scores, scores]), n)
    torch.testing.assert_close(rows[1].exp(), expected, atol=1e-12, rtol=0)
