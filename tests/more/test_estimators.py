"""REINFORCE, RLOO and GRPO by hand, and their groups; see also `practice/checks`."""

import math

import pytest
import torch

from more.common import interval_95
from more.estimators import (
    grpo_advantages,
    grpo_loss,
    reinforce_advantages,
    rloo_advantages,
)
from practice.cells import import_cells
from tests.conftest import refused
from tests.small import t
from utils.settings import NOTEBOOKS, load_settings

EXACT = {"atol": 1e-11, "rtol": 0}
SCORES = t(1.0, 2.0, 6.0, 0.0, 0.0, 3.0)  # of two prompts, three responses each
X, ONES = torch.zeros(2, 3), torch.ones(2, 3)
EQUAL = torch.full((6,), -0.7, dtype=torch.float64)
# The sample's deviation: of 1, 2, 6 it is the root of (4 + 1 + 9) / 2
A, B = math.sqrt(7) + 1e-4, math.sqrt(3) + 1e-4


@pytest.mark.parametrize(
    "function, arguments, expected",
    [
        (reinforce_advantages, (SCORES,), SCORES.tolist()),
        (reinforce_advantages, (SCORES, 1.5), [-0.5, 0.5, 4.5, -1.5, -1.5, 1.5]),
        (rloo_advantages, (SCORES, 3), [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]),
        (grpo_advantages, (SCORES, 3, False), [-2, -1, 3, -1, -1, 2]),
        (grpo_advantages, (SCORES, 3), [-2 / A, -1 / A, 3 / A, -1 / B, -1 / B, 2 / B]),
        (rloo_advantages, (SCORES, 2), [-1, 1, 6, -6, -3, 3]),  # the least group
        (grpo_advantages, (EQUAL, 3), [0] * 6),
    ],
)
def test_advantages_by_hand(function, arguments, expected):
    scores, *rest = arguments
    found = function(scores.clone().requires_grad_(), *rest)
    assert not found.requires_grad
    torch.testing.assert_close(found, t(*expected), **EXACT)


def test_the_loss_by_default_and_its_figures():
    """One token, twice as likely as it was and half as likely as for the reference."""
    new, old, ref = (t([math.log(p)]) for p in (0.4, 0.2, 0.8))
    new.requires_grad_(True)
    k3 = 2 - 1 - math.log(2)
    loss, stats = grpo_loss(new, old, ref, t(1.0), torch.ones(1, 1))
    assert loss.item() == pytest.approx(-1.2 + 0.04 * k3)  # the ratio ends at 1.2
    assert stats["k3"].item() == pytest.approx(k3) and not stats["k3"].requires_grad
    assert stats["ratio_max"].item() == pytest.approx(2)


def test_bad_arguments_are_named():
    refused("not groups of 1; sample 2 or more", rloo_advantages, SCORES, 1)
    refused(r"scores \(6,\) are not groups of 4", grpo_advantages, SCORES, 4)
    refused(r"scores \(2, 3\) are not", grpo_advantages, SCORES.view(2, 3), 3)
    refused("got 'tokens'", grpo_loss, X, X, X, X[:, 0], ONES, mean="tokens")
    refused(r"ref_logprobs \(2, 2\)", grpo_loss, X, X, X[:, :2], X[:, 0], ONES)
    refused(r"advantages \(3,\)", grpo_loss, X, X, X, X[0], ONES)
    refused("2 runs or more, got 1", interval_95, torch.ones(1))
    sizes = {"ppo_episodes": 24, "ppo_rollout_size": 24, "ppo_minibatch_size": 12}
    settings = load_settings("tiny", {**sizes, "ppo_micro_batch_size": 6})
    train_as = import_cells(NOTEBOOKS["5"], "train-as")["train_as"]
    says = r"ppo_rollout_size \(24\) is not made of groups of 5"
    refused(says, train_as, "RLOO", 5, 0, settings)
    says = r"ppo_micro_batch_size \(6\) to ppo_minibatch_size \(12\)"
    refused(says, train_as, "GRPO", 4, 0, settings)


def test_a_group_is_one_prompt_again_and_again():
    in_groups = import_cells(NOTEBOOKS["5"], "in-groups")["in_groups"]
    prompts = in_groups(lambda step: [[step, i] for i in range(6)], 3)
    assert prompts(7) == [[7, 0]] * 3 + [[7, 3]] * 3


def test_an_interval_is_students():
    """By his table: 12.706 for two runs, whose mean is 1 from each."""
    mean, half = interval_95(torch.tensor([[1.0], [3.0]]))
    assert (mean.item(), half.item()) == pytest.approx((2.0, 12.706), abs=1e-3)
