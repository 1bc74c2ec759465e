"""The exact moments of estimators, against theory, and against a simulation."""

import copy

import pytest
import torch

from utils.estimators import grpo_advantages, reinforce_advantages, rloo_advantages
from utils.ppo import compute_gae, kl_estimate, token_rewards
from utils.practice import exact_gradients
from utils.practice.exact_world import ExactWorld

BETA = 0.5


@pytest.fixture(scope="module")
def case():
    """A world, and a policy that has moved away from its reference."""
    world = ExactWorld(seed=3)
    lm = copy.deepcopy(world.reference).double().requires_grad_(True)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    world.reference = world.reference.double()
    return world, lm


def returns(world, lm):
    """R - beta KL of each response, (15,)."""
    with torch.no_grad():
        kl = world.logprobs(lm) - world.logprobs(world.reference)
    return world.scores.double() - BETA * kl


def whole(advantages, k):
    """Weights from advantages of whole responses (groups * k,)."""
    return advantages.view(-1, k, 1).expand(-1, -1, 3) / k


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_group_counts_as_often_as_it_comes(k):
    groups, orders = exact_gradients.all_groups(15, k)
    assert orders.sum() == 15**k and len(groups) == len(
        set(map(tuple, groups.tolist()))
    )


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_reinforce_and_rloo_are_right_on_average(case, shift):
    """Whatever the level of the scores, which only REINFORCE's variance feels."""
    world, lm = case
    R, exact = returns(world, lm), exact_gradients.exact_gradient(world, lm, BETA)
    level = (world.logprobs(lm).detach().exp() @ R).item() + shift
    found = {
        "plain": lambda groups: reinforce_advantages((R + shift)[groups].flatten()),
        "mean": lambda groups: reinforce_advantages(
            (R + shift)[groups].flatten(), level
        ),
        "rloo": lambda groups: rloo_advantages((R + shift)[groups].flatten(), 3),
        "rloo, no shift": lambda groups: rloo_advantages(R[groups].flatten(), 3),
    }
    variance = {}
    for name, advantages in found.items():
        moments = exact_gradients.moments(
            world, lm, lambda groups, a=advantages: whole(a(groups), 3), 3
        )
        distance, angle = moments.bias(exact)
        assert distance < 1e-10 and angle < 1e-6
        variance[name] = moments.variance
    assert variance["rloo"] == pytest.approx(variance["rloo, no shift"], rel=1e-9)
    # The mean of two others is a baseline with a noise of its own
    assert variance["mean"] < variance["rloo"]
    if shift:
        assert variance["rloo"] < variance["plain"]


@pytest.mark.parametrize("k", [2, 4])
def test_the_groups_own_mean_shrinks_the_gradient(case, k):
    world, lm = case
    R, exact = returns(world, lm), exact_gradients.exact_gradient(world, lm, BETA)
    moments = exact_gradients.moments(
        world,
        lm,
        lambda groups: whole(grpo_advantages(R[groups].flatten(), k, scale=False), k),
        k,
    )
    torch.testing.assert_close(moments.mean, exact * (k - 1) / k, atol=1e-12, rtol=1e-9)
    assert moments.bias(exact)[0] == pytest.approx(1 / k, rel=1e-9)


def test_gae_with_the_exact_values_is_right_on_average_for_lambda_1(case):
    """And varies less than the whole response's return."""
    world, lm = case
    exact = exact_gradients.exact_gradient(world, lm, BETA)
    with torch.no_grad():
        log_policy = world.token_logprobs(lm)
        log_ref = world.token_logprobs(world.reference)
    rewards = token_rewards(
        world.scores.double(), log_policy, log_ref, world.mask, BETA
    )
    values = world.values(lm, BETA).detach()
    for lam in (1.0, 0.5):
        advantages, _ = compute_gae(rewards, values, world.mask, 1.0, lam)
        moments = exact_gradients.moments(
            world, lm, lambda groups, a=advantages: a[groups] / 2, 2
        )
        # With the exact values the TD errors are right for every lambda
        assert moments.bias(exact)[0] < 1e-10
    R = returns(world, lm)
    plain = exact_gradients.moments(
        world, lm, lambda groups: whole(R[groups].flatten(), 2), 2
    )
    assert moments.variance < plain.variance


def test_the_moments_are_those_of_a_simulation(case):
    """100,000 groups: mean within 5 standard errors, variance within 3 %."""
    world, lm = case
    R, k, n = returns(world, lm), 3, 100_000
    moments = exact_gradients.moments(
        world,
        lm,
        lambda groups: whole(grpo_advantages(R[groups].flatten(), k), k),
        k,
    )
    probs = world.logprobs(lm).detach().exp()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(probs, n * k, replacement=True, generator=generator)
    weights = grpo_advantages(R[drawn], k) / k
    per_response = exact_gradients.token_gradients(world, lm).sum(dim=1)
    counts = torch.zeros(n, 15, dtype=torch.float64)
    counts.scatter_add_(1, drawn.view(n, k), weights.view(n, k))
    mean = counts.mean(dim=0) @ per_response
    gram = per_response @ per_response.t()
    spread = counts - counts.mean(dim=0)
    variance = ((spread @ gram) * spread).sum(dim=1).mean().item()
    assert variance == pytest.approx(moments.variance, rel=0.03)
    assert (mean - moments.mean).norm() < 5 * (moments.variance / n) ** 0.5


def test_the_exact_gradient_is_that_of_finite_differences(case):
    world, lm = case
    exact = exact_gradients.exact_gradient(world, lm, BETA)
    direction, h = exact / exact.norm(), 1e-5

    def objective(step):
        moved, start = copy.deepcopy(lm), 0
        with torch.no_grad():
            for weight in moved.parameters():
                part = direction[start : start + weight.numel()]
                weight.add_(step * part.view(weight.shape))
                start += weight.numel()
            return world.objective(world.logprobs(moved), BETA).item()

    slope = (objective(h) - objective(-h)) / (2 * h)
    assert slope == pytest.approx(exact.norm().item(), rel=1e-6)


@pytest.mark.parametrize("kind, towards", [("k1", None), ("k2", 0), ("k3", 1)])
def test_the_kl_that_a_differentiated_estimate_goes_down(case, kind, towards):
    """k1's gradient is 0 on average, k2's that of KL(pi, ref), k3's of KL(ref, pi)."""
    world, lm = case
    new, ref = world.logprobs(lm), world.logprobs(world.reference)

    def gradient(x):
        parts = torch.autograd.grad(x, list(lm.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    found = gradient(new.exp().detach() @ kl_estimate(new, ref, kind))
    ways = [gradient((new.exp() * (new - ref)).sum())]
    ways.append(gradient((ref.exp() * (ref - new)).sum()))
    assert (ways[0] - ways[1]).norm() > 0.05 * ways[0].norm()
    right = torch.zeros_like(found) if towards is None else ways[towards]
    torch.testing.assert_close(found, right, atol=1e-12, rtol=1e-9)
