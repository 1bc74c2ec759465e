"""The exact moments of estimators, against theory, and against a simulation."""

import copy

import pytest
import torch

from more.estimators import grpo_advantages, reinforce_advantages, rloo_advantages
from practice.exact_gradients import exact_gradient, moments, token_gradients
from practice.exact_world import ExactWorld
from utils.ppo import compute_gae, token_rewards

BETA = 0.5


@pytest.fixture(scope="module")
def case():
    """A world, a policy that has moved away from its reference, and R - beta KL."""
    world = ExactWorld(seed=3)
    lm = copy.deepcopy(world.reference).double().requires_grad_(True)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        world.reference = world.reference.double()
        kl = world.logprobs(lm) - world.logprobs(world.reference)
    return world, lm, world.scores.double() - BETA * kl


def moments_of(case, k, advantage, shift=0.0):
    world, lm, R = case

    def weights(groups):
        each = advantage((R + shift)[groups].flatten())
        return each.view(-1, k, 1).expand(-1, -1, 3) / k

    return moments(world, lm, weights, k)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_reinforce_and_rloo_are_right_on_average(case, shift):
    """Whatever the level of the scores, which only REINFORCE's variance feels."""
    world, lm, R = case
    exact = exact_gradient(world, lm, BETA)
    level = (world.logprobs(lm).detach().exp() @ R).item() + shift
    plain = moments_of(case, 3, reinforce_advantages, shift)
    mean = moments_of(case, 3, lambda x: reinforce_advantages(x, level), shift)
    rloo = moments_of(case, 3, lambda x: rloo_advantages(x, 3), shift)
    for one in (plain, mean, rloo):
        distance, angle = one.bias(exact)
        assert distance < 1e-10 and angle < 1e-6
    unmoved = moments_of(case, 3, lambda x: rloo_advantages(x, 3)).variance
    assert rloo.variance == pytest.approx(unmoved, rel=1e-9)
    # The mean of two others is a baseline with a noise of its own
    assert mean.variance < rloo.variance
    assert rloo.variance < plain.variance or not shift


@pytest.mark.parametrize("k", [2, 4])
def test_the_groups_own_mean_shrinks_the_gradient(case, k):
    exact = exact_gradient(*case[:2], BETA)
    found = moments_of(case, k, lambda x: grpo_advantages(x, k, scale=False))
    torch.testing.assert_close(found.mean, exact * (k - 1) / k, atol=1e-12, rtol=1e-9)
    assert found.bias(exact)[0] == pytest.approx(1 / k, rel=1e-9)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_gae_with_the_exact_values_is_right_on_average(case, lam):
    """Their TD errors are, so for every lambda; and varies less than the returns."""
    world, lm, _ = case
    with torch.no_grad():
        logs = [world.token_logprobs(model) for model in (lm, world.reference)]
        values = world.values(lm, BETA)
    rewards = token_rewards(world.scores.double(), *logs, world.mask, BETA)
    advantages, _ = compute_gae(rewards, values, world.mask, 1.0, lam)
    found = moments(world, lm, lambda groups: advantages[groups] / 2, 2)
    assert found.bias(exact_gradient(world, lm, BETA))[0] < 1e-10
    assert found.variance < moments_of(case, 2, reinforce_advantages).variance


def test_the_moments_are_those_of_a_simulation(case):
    """20,000 groups: mean within 5 standard errors, variance within 5 %."""
    world, lm, R = case
    k, n = 3, 20_000
    expected = moments_of(case, k, lambda x: grpo_advantages(x, k))
    generator = torch.Generator().manual_seed(0)
    probs = world.logprobs(lm).detach().exp()
    drawn = torch.multinomial(probs, n * k, replacement=True, generator=generator)
    weights = grpo_advantages(R[drawn], k) / k
    per_response = token_gradients(world, lm).sum(dim=1)
    counts = torch.zeros(n, 15, dtype=torch.float64)
    counts.scatter_add_(1, drawn.view(n, k), weights.view(n, k))
    mean = counts.mean(dim=0)
    spread = counts - mean
    variance = ((spread @ per_response @ per_response.t()) * spread).sum(dim=1).mean()
    assert variance.item() == pytest.approx(expected.variance, rel=0.05)
    error = (mean @ per_response - expected.mean).norm()
    assert error < 5 * (expected.variance / n) ** 0.5
