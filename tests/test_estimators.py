"""REINFORCE, RLOO and GRPO against numbers worked by hand."""

import math

import pytest
import torch

from tests.test_ppo import random_case, t
from utils import estimators, ppo

EXACT = {"atol": 1e-12, "rtol": 0}


def test_reinforce_by_hand():
    scores = t(1.0, -2.0, 4.0)
    assert estimators.reinforce_advantages(scores).tolist() == [1, -2, 4]
    assert estimators.reinforce_advantages(scores, 1.5).tolist() == [-0.5, -3.5, 2.5]


def test_rloo_by_hand():
    """Two prompts of three responses: each against the mean of its two others."""
    scores = t(1.0, 2.0, 6.0, 0.0, 0.0, 3.0)
    expected = t(1 - 4.0, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3.0)
    torch.testing.assert_close(estimators.rloo_advantages(scores, 3), expected, **EXACT)


def test_grpo_by_hand():
    """The sample's deviation: of 1, 2, 6 it is the root of (4 + 1 + 9) / 2."""
    scores = t(1.0, 2.0, 6.0, 0.0, 0.0, 3.0)
    plain = [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]
    got = estimators.grpo_advantages(scores, 3, scale=False)
    torch.testing.assert_close(got, t(*plain), **EXACT)
    spreads = [math.sqrt(7) + 1e-4] * 3 + [math.sqrt(3) + 1e-4] * 3
    expected = [x / s for x, s in zip(plain, spreads, strict=True)]
    got = estimators.grpo_advantages(scores, 3)
    torch.testing.assert_close(got, t(*expected), **EXACT)


def test_equal_scores_have_no_advantage():
    scores = torch.full((8,), -0.7)
    for function in (estimators.rloo_advantages, estimators.grpo_advantages):
        found = function(scores, 4)
        assert found.isfinite().all() and found.abs().max() < 1e-3


@pytest.mark.parametrize(
    "function", [estimators.rloo_advantages, estimators.grpo_advantages]
)
def test_advantages_carry_no_gradient_and_bad_groups_are_refused(function):
    scores = torch.randn(6, requires_grad=True)
    assert not function(scores, 3).requires_grad
    with pytest.raises(ValueError, match="2 or more, got 1"):
        function(scores, 1)
    with pytest.raises(ValueError, match=r"scores \(6,\) are not groups of 4"):
        function(scores, 4)
    with pytest.raises(ValueError, match=r"scores \(2, 3\) are not groups of 3"):
        function(scores.view(2, 3), 3)


def test_grpo_loss_by_hand():
    """Two responses, of two tokens and of one; ratios 1.5 and 1, 0.5."""
    new = t([math.log(0.6), math.log(0.5)], [math.log(0.2), 9.0])
    old = t([math.log(0.4), math.log(0.5)], [math.log(0.4), 9.0])
    ref = t([math.log(0.3), math.log(0.5)], [math.log(0.4), -9.0])
    mask, advantages = t([1, 1], [1, 0]), t(1.0, -2.0)
    # -A rho, clipped at 1.2 above and at 0.8 below
    tokens = [-1.2, -1.0, 1.6]
    # pi_ref / pi - 1 - log(pi_ref / pi): 0.5, 1 and 2
    k3 = [0.5 - 1 + math.log(2), 0.0, 2 - 1 - math.log(2)]
    each = [x + 0.1 * y for x, y in zip(tokens, k3, strict=True)]
    by_token = sum(each) / 3
    by_response = ((each[0] + each[1]) / 2 + each[2]) / 2
    for mean, expected in (("token", by_token), ("response", by_response)):
        loss, stats = estimators.grpo_loss(
            new, old, ref, advantages, mask, 0.2, 0.1, mean
        )
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert stats["k3"].item() == pytest.approx(sum(k3) / 3, abs=1e-12)
        assert stats["clip_fraction"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_without_kl_and_by_token_it_is_ppos_loss(seed):
    draw, mask = random_case(seed)
    new, old, ref, advantages = draw(), draw(), draw(), draw()[:, 0]
    wide = advantages.unsqueeze(1).expand(mask.shape)
    expected, stats = ppo.policy_loss(new, old, wide, mask)
    loss, found = estimators.grpo_loss(
        new, old, ref, advantages, mask, kl_coef=0.0, mean="token"
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    for name, value in stats.items():
        torch.testing.assert_close(found[name], value, **EXACT)


def test_the_first_loss_is_0_and_its_gradient_is_not():
    """Before the first step the ratio is 1, and a group's advantages add up to 0."""
    old = -torch.rand(4, 3, dtype=torch.float64)
    new, mask = old.clone().requires_grad_(), torch.ones(4, 3)
    advantages = estimators.grpo_advantages(torch.randn(4).double(), 4)
    loss, _ = estimators.grpo_loss(new, old, old, advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(new.grad, -advantages[:, None].expand(4, 3) / 12)


def test_what_lies_outside_the_mask_reaches_nothing():
    draw, _ = random_case(0)
    new, old, ref = (draw()[:3, :4] for _ in range(3))
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    spoilt = []
    for x in (new, old, ref):
        spoilt.append(torch.where(mask.bool(), x, torch.nan))
    spoilt[0].requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    for mean in ("token", "response"):
        expected, _ = estimators.grpo_loss(new, old, ref, advantages, mask, mean=mean)
        loss, stats = estimators.grpo_loss(*spoilt, advantages, mask, mean=mean)
        (gradient,) = torch.autograd.grad(loss, spoilt[0])
        torch.testing.assert_close(loss, expected, **EXACT)
        assert gradient.isfinite().all() and not gradient[mask == 0].any()
        assert all(value.isfinite() for value in stats.values())


def test_bad_arguments_are_named():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="response or token, got 'tokens'"):
        estimators.grpo_loss(x, x, x, torch.zeros(2), mask, mean="tokens")
    with pytest.raises(ValueError, match=r"ref_logprobs \(2, 2\)"):
        estimators.grpo_loss(x, x, x[:, :2], torch.zeros(2), mask)
    with pytest.raises(ValueError, match=r"advantages \(3,\)"):
        estimators.grpo_loss(x, x, x, torch.zeros(3), mask)
