"""The checks pass what is right, and name every known mistake."""

import math
import re

import pytest
import torch

from more import estimators, lora, preferences
from practice import checks
from practice.cells import import_cells
from utils import data, models, ppo, rollout

SEEDS, EIGHT = range(20), import_cells("more/8-Adapters.ipynb", "read-one-base")
CORRECT = {  # check: the function of ours that it must pass
    checks.check_whiten: ppo.masked_whiten,
    checks.check_gae: ppo.compute_gae,
    checks.check_policy_loss: ppo.policy_loss,
    checks.check_value_loss: ppo.value_loss,
    checks.check_token_rewards: ppo.token_rewards,
    checks.check_kl_estimate: ppo.kl_estimate,
    checks.check_token_logprobs: ppo.token_logprobs,
    checks.check_lm_labels: data.lm_labels,
    checks.check_evaluate_responses: rollout.evaluate_responses,
    checks.check_reward_head: models.RewardHead,
    checks.check_rloo_advantages: estimators.rloo_advantages,
    checks.check_grpo_advantages: estimators.grpo_advantages,
    checks.check_grpo_loss: estimators.grpo_loss,
    checks.check_bradley_terry_loss: preferences.bradley_terry_loss,
    checks.check_dpo_loss: preferences.dpo_loss,
    checks.check_adapted_layer: lora.adapted_layer,
    checks.check_merged_weight: lora.merged_weight,
    checks.check_read_one_base: EIGHT["read_one_base"],
}
MISTAKES = [(check, *one) for check in CORRECT for one in check.mistakes]


@pytest.mark.parametrize("check", CORRECT, ids=lambda check: check.__name__)
def test_the_right_function_passes_its_check(check):
    accused = [check(CORRECT[check], seed).message for seed in SEEDS]
    assert accused == [""] * len(SEEDS)


@pytest.mark.parametrize(
    "check, sentence, wrong", MISTAKES, ids=lambda part: getattr(part, "__name__", part)
)
def test_a_known_mistake_is_caught_and_named(check, sentence, wrong):
    said = [check(wrong, seed).message for seed in SEEDS]
    assert said == [f"this is what you get when {sentence}"] * len(SEEDS)


def test_every_check_is_here_and_knows_mistakes():
    there = {x for name, x in vars(checks).items() if name.startswith("check_")}
    assert there == set(CORRECT) and all(check.mistakes for check in there)


def test_a_pass_prints_one_line_and_is_true(capsys):
    result = checks.check_gae(ppo.compute_gae)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✓ compute_gae: largest difference ")
    assert result and result.difference < 1e-12
    assert result._ipython_display_() is None  # a cell does not show it twice


def swapped_and_other(chosen, rejected):
    """Two mistakes at once: the first wrong quantity is explained, and named."""
    loss, stats = preferences.bradley_terry_loss(rejected, chosen)
    return loss, {**stats, "margin": torch.tensor(7.0)}


GAE = checks.check_gae
FAILURES = [
    (GAE, lambda *given: None, "gives no returns"),
    (GAE, lambda rewards, *_: rewards.nothing, "raised AttributeError.*nothing"),
    (GAE, lambda r, *_: (r.T, r.T), r"advantages has the shape \(7, 5\), expected "),
    (GAE, lambda r, *_: (r * math.nan, r), r"advantages\[\d, \d\] is nan, expected"),
    (GAE, lambda r, *_: (r * 0 + 42, r), r"advantages\[\d, \d\] is 42.0000, expected"),
    (checks.check_bradley_terry_loss, swapped_and_other, "rejected are swapped"),
]  # fmt: skip


@pytest.mark.parametrize("check, function, says", FAILURES)
def test_any_failure_is_a_line_and_not_a_crash(check, function, says, capsys):
    result = check(function)
    assert not result and re.search(says, result.message)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✗ {function.__name__}: largest difference")


def test_the_inputs_are_the_learners_to_change_and_fresh_for_each_seed():
    """A function that works in place is judged by its result."""
    seen = []

    def in_place(x, mask):
        seen.append(x.clone())
        x -= x[mask.bool()].mean()
        x /= x[mask.bool()].std(correction=0)
        x[mask == 0] = 0
        return x

    assert all(checks.check_whiten(in_place, seed) for seed in (0, 1, 0))
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
