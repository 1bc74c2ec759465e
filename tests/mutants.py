"""Known mistakes of PPO code, each as a small wrong variant of one of our functions.

`MATHEMATICS`: wrong functions, each with the check that must catch it and what the
check must say. `LOOP`: mistakes of a training loop, each with what must catch it.
"""

import dataclasses
import functools
import inspect
import math
import random
from dataclasses import dataclass
from typing import Any

import nbformat
import torch
from torch import nn

from tests import test_evaluation, test_lesson_5, test_loop, test_preflight
from utils import estimators, lora, ppo, preferences, training
from utils.data import lm_labels
from utils.models import RewardHead, ValueHead, hidden_states
from utils.practice import checks, exact_world
from utils.rollout import (
    evaluate_responses,
    logprobs_from_hidden,
    response_hidden_states,
)
from utils.settings import TINY
from utils.support.notebook import ROOT, import_cells

CORRECT = {  # check: the function of ours that it must pass
    checks.check_whiten: ppo.masked_whiten,
    checks.check_gae: ppo.compute_gae,
    checks.check_policy_loss: ppo.policy_loss,
    checks.check_value_loss: ppo.value_loss,
    checks.check_token_rewards: ppo.token_rewards,
    checks.check_kl_estimate: ppo.kl_estimate,
    checks.check_token_logprobs: ppo.token_logprobs,
    checks.check_lm_labels: lm_labels,
    checks.check_evaluate_responses: evaluate_responses,
    checks.check_reward_head: RewardHead,
    checks.check_rloo_advantages: estimators.rloo_advantages,
    checks.check_grpo_advantages: estimators.grpo_advantages,
    checks.check_grpo_loss: estimators.grpo_loss,
    checks.check_shaped_rewards: estimators.shaped_rewards,
    checks.check_bradley_terry_loss: preferences.bradley_terry_loss,
    checks.check_dpo_loss: preferences.dpo_loss,
    checks.check_adapted_layer: lora.adapted_layer,
    checks.check_merged_weight: lora.merged_weight,
    checks.check_read_one_base: lora.read_one_base,
}


@dataclass(frozen=True)
class Mutant:
    """A wrong function, the check that must catch it, and part of what it must say."""

    mistake: str
    check: Any
    diagnosis: str
    function: Any


MATHEMATICS = []


def mutant(check, mistake, diagnosis):
    """Enter the decorated function (or class) as this mistake."""

    def enter(function):
        MATHEMATICS.append(Mutant(mistake, check, diagnosis, function))
        return function

    return enter


def left(x):
    """x (B, T) with every slot's number one slot earlier, 0 in the last."""
    return nn.functional.pad(x[:, 1:], (0, 1))


def everywhere(mask):
    return torch.ones_like(mask)


# --- whitening


@mutant(checks.check_whiten, "whitening adds the mean back", "mean is added back")
def _(x, mask):
    return ppo.masked_whiten(x, mask) + ppo.masked_mean(x, mask) * mask


@mutant(checks.check_whiten, "whitening over padding too", "padding is counted in the")
def _(x, mask):
    return ppo.masked_whiten(x, everywhere(mask)) * mask


@mutant(checks.check_whiten, "padding whitened too", "padding is counted, and whitened")
def _(x, mask):
    return ppo.masked_whiten(x, everywhere(mask))


@mutant(checks.check_whiten, "sample variance, n - 1", "divided by n - 1")
def _(x, mask):
    inside = x[mask.bool()]
    return (x - inside.mean()) / inside.std() * mask


@mutant(checks.check_whiten, "scaled but not centred", "mean is not taken away")
def _(x, mask):
    return x * mask / ppo.masked_var(x, mask).sqrt()


@mutant(checks.check_whiten, "centred but not scaled", "variance is not made 1")
def _(x, mask):
    return (x - ppo.masked_mean(x, mask)) * mask


@mutant(checks.check_whiten, "divided by the variance", "variance, not its root")
def _(x, mask):
    return (x - ppo.masked_mean(x, mask)) * mask / ppo.masked_var(x, mask)


# --- advantages and returns


@mutant(checks.check_gae, "advantages whitened before the returns", "whitened first")
def _(rewards, values, mask, gamma, lam):
    advantages, _ = ppo.compute_gae(rewards, values, mask, gamma, lam)
    white = ppo.masked_whiten(advantages, mask)
    return white, white + values * mask


@mutant(checks.check_gae, "returns of whitened advantages", "whitened first")
def _(rewards, values, mask, gamma, lam):
    advantages, _ = ppo.compute_gae(rewards, values, mask, gamma, lam)
    return advantages, ppo.masked_whiten(advantages, mask) + values * mask


@mutant(checks.check_gae, "advantages come out whitened", "come out whitened")
def _(rewards, values, mask, gamma, lam):
    advantages, returns = ppo.compute_gae(rewards, values, mask, gamma, lam)
    return ppo.masked_whiten(advantages, mask), returns


@mutant(checks.check_gae, "values one slot late", "values are read one slot late")
def _(rewards, values, mask, gamma, lam):
    return ppo.compute_gae(rewards, left(values * mask), mask, gamma, lam)


@mutant(checks.check_gae, "advantages run into the padding", "on into the padding")
def _(rewards, values, mask, gamma, lam):
    advantages, returns = ppo.compute_gae(rewards, values, everywhere(mask), gamma, lam)
    return advantages * mask, returns * mask


@mutant(checks.check_gae, "bootstrap from behind EOS", "slot behind EOS has a value")
def _(rewards, values, mask, gamma, lam):
    next_values = left(values)
    delta = (rewards + gamma * next_values - values) * mask
    advantages, _ = ppo.compute_gae(delta, 0 * values, mask, gamma * lam, 1.0)
    return advantages, advantages + values * mask


@mutant(checks.check_gae, "lambda left out", "lambda is left out")
def _(rewards, values, mask, gamma, lam):
    return ppo.compute_gae(rewards, values, mask, gamma, 1.0)


@mutant(checks.check_gae, "gamma left out", "gamma is left out")
def _(rewards, values, mask, gamma, lam):
    return ppo.compute_gae(rewards, values, mask, 1.0, lam)


@mutant(checks.check_gae, "TD errors not summed", "only the TD error")
def _(rewards, values, mask, gamma, lam):
    return ppo.compute_gae(rewards, values, mask, gamma, 0.0)


@mutant(checks.check_gae, "recursion from left to right", "from first token to last")
def _(rewards, values, mask, gamma, lam):
    flipped = (x.flip(1) for x in (rewards * mask, values * mask, mask))
    advantages, returns = ppo.compute_gae(*flipped, gamma, lam)
    return advantages.flip(1), returns.flip(1)


@mutant(checks.check_gae, "returns without the values", "returns lack the values")
def _(rewards, values, mask, gamma, lam):
    advantages, _ = ppo.compute_gae(rewards, values, mask, gamma, lam)
    return advantages, advantages


# --- the policy loss


def surrogate(logprobs, old_logprobs, advantages, mask, clip_range, pick):
    """`ppo.policy_loss` with another choice between its two branches."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    _, stats = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)
    return ppo.masked_mean(pick(plain, clipped), mask), stats


@mutant(checks.check_policy_loss, "min for max", "min stands for max")
def _(*arguments):
    return surrogate(*arguments, torch.minimum)


@mutant(checks.check_policy_loss, "sign of the advantages", "sign is turned: worse")
def _(logprobs, old_logprobs, advantages, mask, clip_range):
    return ppo.policy_loss(logprobs, old_logprobs, -advantages, mask, clip_range)


@mutant(checks.check_policy_loss, "maximised, not minimised", "sign is turned, and min")
def _(*arguments):
    loss, stats = ppo.policy_loss(*arguments)
    return -loss, stats


@mutant(checks.check_policy_loss, "no clipping", "ratio is not clipped")
def _(*arguments):
    return surrogate(*arguments, lambda plain, clipped: plain)


@mutant(checks.check_policy_loss, "the clipped branch alone", "only the clipped branch")
def _(*arguments):
    return surrogate(*arguments, lambda plain, clipped: clipped)


@mutant(checks.check_policy_loss, "log-ratio clipped, not ratio", "log rho is clipped")
def _(logprobs, old_logprobs, advantages, mask, clip_range):
    log_ratio = logprobs - old_logprobs
    near = log_ratio.clamp(-clip_range, clip_range).exp()
    losses = torch.maximum(-advantages * log_ratio.exp(), -advantages * near)
    _, stats = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)
    return ppo.masked_mean(losses, mask), stats


@mutant(checks.check_policy_loss, "ratio old / new", "ratio is turned around")
def _(logprobs, old_logprobs, advantages, mask, clip_range):
    return ppo.policy_loss(old_logprobs, logprobs, advantages, mask, clip_range)


@mutant(checks.check_policy_loss, "approx_kl of new against old", "approx_kl is turned")
def _(logprobs, old_logprobs, advantages, mask, clip_range):
    loss, stats = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)
    turned = ppo.kl_estimate(logprobs, old_logprobs, "k3")
    return loss, {**stats, "approx_kl": ppo.masked_mean(turned, mask).detach()}


# --- the value loss


def squared_error(values, old_values, returns, mask, clip_range, pick, centre):
    """`ppo.value_loss` with another choice of branch, and of what to clip around."""
    near = values.clamp(centre - clip_range, centre + clip_range)
    errors = pick((values - returns) ** 2, (near - returns) ** 2)
    _, stats = ppo.value_loss(values, old_values, returns, mask, clip_range)
    return 0.5 * ppo.masked_mean(errors, mask), stats


@mutant(
    checks.check_value_loss,
    "value clipped around the return",
    "around the return nothing ever",
)
def _(values, old_values, returns, mask, clip_range):
    arguments = (values, old_values, returns, mask, clip_range)
    return squared_error(*arguments, torch.maximum, returns)


@mutant(checks.check_value_loss, "value clipped around 0", "clipped around 0")
def _(values, old_values, returns, mask, clip_range):
    arguments = (values, old_values, returns, mask, clip_range)
    return squared_error(*arguments, torch.maximum, torch.zeros_like(returns))


@mutant(checks.check_value_loss, "min for max of the errors", "min stands for max")
def _(values, old_values, returns, mask, clip_range):
    arguments = (values, old_values, returns, mask, clip_range)
    return squared_error(*arguments, torch.minimum, old_values)


@mutant(checks.check_value_loss, "values not clipped", "nothing is clipped")
def _(values, old_values, returns, mask, clip_range):
    _, stats = ppo.value_loss(values, old_values, returns, mask, clip_range)
    return ppo.value_loss(values, old_values, returns, mask, 1e6)[0], stats


@mutant(checks.check_value_loss, "the clipped error alone", "only the clipped error")
def _(values, old_values, returns, mask, clip_range):
    arguments = (values, old_values, returns, mask, clip_range)
    return squared_error(*arguments, lambda plain, clipped: clipped, old_values)


@mutant(checks.check_value_loss, "the half left out", "factor 1/2 is left out")
def _(*arguments):
    loss, stats = ppo.value_loss(*arguments)
    return 2 * loss, stats


# --- both losses


def around(check, loss):
    """Mistakes around a loss that is a mean over tokens."""

    @mutant(check, "no mask", "there is no mask")
    def _(x, old, target, mask, clip_range):
        return loss(x, old, target, everywhere(mask), clip_range)

    @mutant(check, "sum divided by all slots", "divided by the number of all slots")
    def _(x, old, target, mask, clip_range):
        value, stats = loss(x, old, target, mask, clip_range)
        return value * mask.sum() / mask.numel(), stats

    @mutant(check, "mean of the responses' means", "each response weighs")
    def _(x, old, target, mask, clip_range):
        _, stats = loss(x, old, target, mask, clip_range)
        rows = zip(x, old, target, mask, strict=True)
        values = [loss(*(part[None] for part in row), clip_range)[0] for row in rows]
        return torch.stack(values).mean(), stats

    @mutant(check, "loss without a gradient", "has no gradient")
    def _(*arguments):
        value, stats = loss(*arguments)
        return value.detach(), stats


around(checks.check_policy_loss, ppo.policy_loss)
around(checks.check_value_loss, ppo.value_loss)


# --- rewards


@mutant(checks.check_token_rewards, "sign of k1 in the reward", "sign of the KL")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    return ppo.token_rewards(scores, ref_logprobs, logprobs, mask, kl_coef)


@mutant(checks.check_token_rewards, "score on the slot after EOS", "slot after EOS")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    slot = mask.sum(dim=1).clamp(max=mask.shape[1] - 1)
    rewards[torch.arange(len(scores)), slot] += scores
    return rewards


@mutant(checks.check_token_rewards, "score on the last slot", "on the last slot")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rewards[:, -1] += scores
    return rewards


@mutant(checks.check_token_rewards, "score on the first token", "on the first token")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rewards[:, 0] += scores
    return rewards


@mutant(
    checks.check_token_rewards, "score on every token", "every token gets the score"
)
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    return (scores[:, None] - kl_coef * (logprobs - ref_logprobs)) * mask


@mutant(checks.check_token_rewards, "KL coefficient left out", "KL coefficient is left")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    return ppo.token_rewards(scores, logprobs, ref_logprobs, mask, 1.0)


@mutant(checks.check_token_rewards, "KL penalty left out", "KL penalty is left out")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    return ppo.token_rewards(scores, logprobs, ref_logprobs, mask, 0.0)


@mutant(checks.check_token_rewards, "padding pays KL", "padding pays")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    right = ppo.token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    return right - kl_coef * (logprobs - ref_logprobs) * (1 - mask)


@mutant(checks.check_token_rewards, "k3 in the reward", "k3 stands for k1")
def _(scores, logprobs, ref_logprobs, mask, kl_coef):
    right = ppo.token_rewards(scores, logprobs, ref_logprobs, mask, 0.0)
    k3 = ppo.kl_estimate(logprobs, ref_logprobs, "k3")
    return right - kl_coef * k3 * mask


# --- estimators of the KL


@mutant(checks.check_kl_estimate, "sign of k1", "sign of k1 is turned")
def _(logprobs, ref_logprobs, kind):
    sign = -1 if kind == "k1" else 1
    return sign * ppo.kl_estimate(logprobs, ref_logprobs, kind)


@mutant(checks.check_kl_estimate, "k1 made positive", "k1 is made positive")
def _(logprobs, ref_logprobs, kind):
    return ppo.kl_estimate(logprobs, ref_logprobs, kind).abs()


@mutant(checks.check_kl_estimate, "k2 without its half", "factor 1/2 of k2")
def _(logprobs, ref_logprobs, kind):
    factor = 2 if kind == "k2" else 1
    return factor * ppo.kl_estimate(logprobs, ref_logprobs, kind)


@mutant(
    checks.check_kl_estimate, "k3 with the log-ratio reversed", "log-ratio reversed"
)
def _(logprobs, ref_logprobs, kind):
    if kind == "k3":
        logprobs, ref_logprobs = ref_logprobs, logprobs
    return ppo.kl_estimate(logprobs, ref_logprobs, kind)


@mutant(checks.check_kl_estimate, "k3 without its last term", "k3 lacks its last term")
def _(logprobs, ref_logprobs, kind):
    extra = (logprobs - ref_logprobs) * (kind == "k3")
    return ppo.kl_estimate(logprobs, ref_logprobs, kind) - extra


# --- log-probabilities, labels, places


@mutant(
    checks.check_token_logprobs, "log-probs shifted by one", "label is the next slot's"
)
def _(logits, labels, temperature=1.0):
    return ppo.token_logprobs(logits, labels.roll(-1, dims=1), temperature)


@mutant(
    checks.check_token_logprobs, "probabilities, not their logs", "logarithm is left"
)
def _(logits, labels, temperature=1.0):
    return ppo.token_logprobs(logits, labels, temperature).exp()


@mutant(checks.check_token_logprobs, "logits not normalised", "not normalised")
def _(logits, labels, temperature=1.0):
    return (logits / temperature).gather(-1, labels[..., None])[..., 0]


@mutant(checks.check_token_logprobs, "temperature left out", "temperature is left out")
def _(logits, labels, temperature=1.0):
    return ppo.token_logprobs(logits, labels)


@mutant(checks.check_token_logprobs, "log-probs divided by tau", "not the logits, are")
def _(logits, labels, temperature=1.0):
    return ppo.token_logprobs(logits, labels) / temperature


@mutant(checks.check_lm_labels, 'pad mask from "id == eos"', "padding is found by id")
def _(input_ids, attention_mask):
    return input_ids.masked_fill(input_ids == input_ids.max(), -100)


@mutant(checks.check_lm_labels, "padding kept as labels", "padding keeps its labels")
def _(input_ids, attention_mask):
    return input_ids


@mutant(checks.check_lm_labels, "labels shifted twice", "labels are shifted")
def _(input_ids, attention_mask):
    shifted = lm_labels(input_ids, attention_mask).roll(-1, dims=1)
    shifted[:, -1] = -100
    return shifted


@mutant(checks.check_evaluate_responses, "values one slot late", "values are read one")
def _(policy, input_ids, attention_mask, mask, temperature):
    logprobs, _ = evaluate_responses(
        policy, input_ids, attention_mask, mask, temperature
    )
    hidden = hidden_states(policy.lm.base_model, input_ids, attention_mask)
    return logprobs, policy.value_head(hidden[:, -mask.shape[1] :]) * mask


@mutant(
    checks.check_evaluate_responses, "log-probs shifted by one", "are shifted by one"
)
def _(policy, input_ids, attention_mask, mask, temperature):
    _, values = evaluate_responses(policy, input_ids, attention_mask, mask, temperature)
    hidden = hidden_states(policy.lm.base_model, input_ids, attention_mask)
    late = hidden[:, -mask.shape[1] :]
    return logprobs_from_hidden(policy.lm, late, input_ids, mask, temperature), values


@mutant(checks.check_evaluate_responses, 'pad mask from "id == eos"', "closing EOS is")
def _(policy, input_ids, attention_mask, mask, temperature):
    eos = input_ids[0, 0]  # the padding of the first prompt
    _, values = evaluate_responses(policy, input_ids, attention_mask, mask, temperature)
    hidden = response_hidden_states(policy.lm, input_ids, attention_mask, mask)
    real = (input_ids[:, -mask.shape[1] :] != eos).long()
    return logprobs_from_hidden(policy.lm, hidden, input_ids, real, temperature), values


@mutant(
    checks.check_evaluate_responses, "positions count padding", "positions count the"
)
def _(policy, input_ids, attention_mask, mask, temperature):
    states = policy.lm.base_model(input_ids, attention_mask).last_hidden_state
    hidden = states[:, -mask.shape[1] - 1 : -1]
    logprobs = logprobs_from_hidden(policy.lm, hidden, input_ids, mask, temperature)
    return logprobs, policy.value_head(hidden) * mask


@mutant(checks.check_evaluate_responses, "temperature left out", "temperature is left")
def _(policy, input_ids, attention_mask, mask, temperature):
    return evaluate_responses(policy, input_ids, attention_mask, mask)


# --- the reward head


mutant(checks.check_reward_head, "reward head of zeros", "weights are zeros")(ValueHead)


@mutant(checks.check_reward_head, "nn.Linear's own start", "nn.Linear's own")
class _(RewardHead):
    def __init__(self, hidden_size):
        nn.Linear.__init__(self, hidden_size, 1)


@mutant(checks.check_reward_head, "spread 1 / (d + 1)", "1 / (d + 1), without the root")
class _(RewardHead):
    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.weight.data /= math.sqrt(hidden_size + 1)


@mutant(checks.check_reward_head, "spread 0.02", "GPT-2's 0.02")
class _(RewardHead):
    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        nn.init.normal_(self.weight, std=0.02)


@mutant(checks.check_reward_head, "sigmoid in the head", "through a sigmoid")
class _(RewardHead):
    def forward(self, hidden):
        return super().forward(hidden).sigmoid()


@mutant(checks.check_reward_head, "last dimension kept", "has the shape (2, 3, 1)")
class _(RewardHead):
    def forward(self, hidden):
        return super().forward(hidden)[..., None]


# --- the loop


# --- rewards on the way


def moved(x, by=1):
    """x with its columns moved to the left by so many, 0 where none is left."""
    return torch.nn.functional.pad(x[:, by:], (0, by))


@mutant(checks.check_shaped_rewards, "sign of the shaping turned", "sign is turned")
def _(rewards, potentials, mask, gamma):
    return 2 * rewards * mask - estimators.shaped_rewards(
        rewards, potentials, mask, gamma
    )


@mutant(checks.check_shaped_rewards, "shaping without gamma", "gamma is left out")
def _(rewards, potentials, mask, gamma):
    return estimators.shaped_rewards(rewards, potentials, mask)


@mutant(checks.check_shaped_rewards, "a potential behind EOS", "behind the last token")
def _(rewards, potentials, mask, gamma):
    return (rewards + gamma * moved(potentials) - potentials) * mask


@mutant(checks.check_shaped_rewards, "a bonus for the next state", "it is a bonus")
def _(rewards, potentials, mask, gamma):
    return (rewards + gamma * moved(potentials * mask)) * mask


@mutant(checks.check_shaped_rewards, "shaping one token late", "one place late")
def _(rewards, potentials, mask, gamma):
    before = torch.nn.functional.pad(potentials[:, :-1], (1, 0))
    return (rewards + gamma * potentials - before) * mask


@mutant(checks.check_shaped_rewards, "nothing but the shaping", "itself is left out")
def _(rewards, potentials, mask, gamma):
    return estimators.shaped_rewards(torch.zeros_like(rewards), potentials, mask, gamma)


@mutant(checks.check_shaped_rewards, "padding is shaped", "padding is shaped")
def _(rewards, potentials, mask, gamma):
    return rewards + gamma * moved(potentials) - potentials


# --- the estimators


def grouped(scores, group_size):
    return scores.view(-1, group_size)


@mutant(
    checks.check_rloo_advantages, "own mean for that of the others", "mean of all k"
)
def _(scores, group_size):
    groups = grouped(scores, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


@mutant(checks.check_rloo_advantages, "groups across prompts", "across the prompts")
def _(scores, group_size):
    turned = scores.view(group_size, -1).t().flatten()
    found = estimators.rloo_advantages(turned, group_size)
    return found.view(-1, group_size).t().flatten()


@mutant(checks.check_rloo_advantages, "the batch is one group", "are one group")
def _(scores, group_size):
    return estimators.rloo_advantages(scores, len(scores))


@mutant(checks.check_rloo_advantages, "RLOO without a baseline", "no baseline")
def _(scores, group_size):
    return estimators.reinforce_advantages(scores)


@mutant(
    checks.check_rloo_advantages, "RLOO divided by the spread", "divided by the spread"
)
def _(scores, group_size):
    spread = grouped(scores, group_size).std(dim=1).repeat_interleave(group_size)
    return estimators.rloo_advantages(scores, group_size) / (spread + 1e-4)


@mutant(checks.check_rloo_advantages, "sum of the others over k", "divided by k, not")
def _(scores, group_size):
    groups = grouped(scores, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / group_size
    return (groups - others).flatten()


@mutant(checks.check_rloo_advantages, "sign of RLOO turned", "sign is turned")
def _(scores, group_size):
    return -estimators.rloo_advantages(scores, group_size)


@mutant(checks.check_grpo_advantages, "std over the batch", "of the whole batch")
def _(scores, group_size):
    centred = estimators.grpo_advantages(scores, group_size, scale=False)
    return centred / (scores.std() + 1e-4)


@mutant(checks.check_grpo_advantages, "std left out", "not divided by the spread")
def _(scores, group_size):
    return estimators.grpo_advantages(scores, group_size, scale=False)


@mutant(checks.check_grpo_advantages, "population std", "divided by k, not by k - 1")
def _(scores, group_size):
    spread = grouped(scores, group_size).std(dim=1, correction=0, keepdim=True)
    centred = estimators.grpo_advantages(scores, group_size, scale=False)
    return (grouped(centred, group_size) / (spread + 1e-4)).flatten()


@mutant(checks.check_grpo_advantages, "variance for its root", "the variance, not its")
def _(scores, group_size):
    variance = grouped(scores, group_size).var(dim=1, keepdim=True)
    centred = estimators.grpo_advantages(scores, group_size, scale=False)
    return (grouped(centred, group_size) / (variance + 1e-4)).flatten()


@mutant(checks.check_grpo_advantages, "RLOO's baseline in GRPO", "as in RLOO")
def _(scores, group_size):
    right = estimators.grpo_advantages(scores, group_size)
    return right * group_size / (group_size - 1)


@mutant(
    checks.check_grpo_advantages, "GRPO's groups across prompts", "across the prompts"
)
def _(scores, group_size):
    turned = scores.view(group_size, -1).t().flatten()
    found = estimators.grpo_advantages(turned, group_size)
    return found.view(-1, group_size).t().flatten()


def with_kl(function):
    """`grpo_loss` with another price for the KL."""

    def changed(new, old, ref, advantages, mask, clip_range, kl_coef, mean):
        coef = function(kl_coef)
        rest = (advantages, mask, clip_range, coef, mean)
        return estimators.grpo_loss(new, old, ref, *rest)

    return changed


mutant(checks.check_grpo_loss, "sign of GRPO's KL", "wrong sign")(with_kl(lambda x: -x))
mutant(checks.check_grpo_loss, "KL counted twice", "twice")(with_kl(lambda x: 2 * x))
mutant(checks.check_grpo_loss, "GRPO without its KL", "left out")(
    with_kl(lambda x: 0.0)
)


@mutant(checks.check_grpo_loss, "k3 reversed in the loss", "reversed")
def _(new, old, ref, advantages, mask, clip_range, kl_coef, mean):
    # About pi_theta, k3 of the turned ratio is that of the turned pair
    plain, stats = estimators.grpo_loss(
        new, old, ref, advantages, mask, clip_range, 0.0, mean
    )
    k3 = ppo.kl_estimate(ref, new, "k3") * mask
    lengths = mask.sum(dim=1)
    over = {"token": k3.sum() / mask.sum(), "response": (k3.sum(1) / lengths).mean()}
    return plain + kl_coef * over[mean], stats


@mutant(checks.check_grpo_loss, "1 / length in the wrong mean", "also with mean by tok")
def _(*arguments, mean):
    return estimators.grpo_loss(*arguments, mean="response")


@mutant(checks.check_grpo_loss, "1 / length left out", "also with mean by response")
def _(*arguments, mean):
    return estimators.grpo_loss(*arguments, mean="token")


@mutant(checks.check_grpo_loss, "divided by the widest response", "by all slots")
def _(new, old, ref, advantages, mask, clip_range, kl_coef, mean):
    rest = (advantages, mask, clip_range, kl_coef)
    loss, stats = estimators.grpo_loss(new, old, ref, *rest, mean="token")
    return loss * mask.sum() / mask.numel(), stats


# --- preferences


@mutant(checks.check_bradley_terry_loss, "chosen and rejected swapped", "are swapped")
def _(chosen, rejected):
    return preferences.bradley_terry_loss(rejected, chosen)


@mutant(checks.check_bradley_terry_loss, "a tie counts as a win", "tie counts as a win")
def _(chosen, rejected):
    loss, stats = preferences.bradley_terry_loss(chosen, rejected)
    return loss, {**stats, "accuracy": (chosen >= rejected).double().mean()}


@mutant(checks.check_bradley_terry_loss, "no logarithm", "has no logarithm")
def _(chosen, rejected):
    _, stats = preferences.bradley_terry_loss(chosen, rejected)
    return -torch.sigmoid(chosen - rejected).mean(), stats


@mutant(checks.check_bradley_terry_loss, "no sigmoid", "without a sigmoid")
def _(chosen, rejected):
    _, stats = preferences.bradley_terry_loss(chosen, rejected)
    return (rejected - chosen).mean(), stats


@mutant(checks.check_bradley_terry_loss, "sum over the pairs", "a sum over the pairs")
def _(chosen, rejected):
    loss, stats = preferences.bradley_terry_loss(chosen, rejected)
    return loss * len(chosen), stats


@mutant(checks.check_dpo_loss, "DPO swapped", "are swapped")
def _(chosen, rejected, ref_chosen, ref_rejected, *rest):
    return preferences.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, *rest)


@mutant(checks.check_dpo_loss, "DPO without a reference", "reference is left out")
def _(chosen, rejected, ref_chosen, ref_rejected, *rest):
    nothing = torch.zeros_like(ref_chosen)
    return preferences.dpo_loss(chosen, rejected, nothing, nothing, *rest)


@mutant(checks.check_dpo_loss, "reference added", "reference has the wrong sign")
def _(chosen, rejected, ref_chosen, ref_rejected, *rest):
    return preferences.dpo_loss(chosen, rejected, -ref_chosen, -ref_rejected, *rest)


@mutant(checks.check_dpo_loss, "beta outside the sigmoid", "outside of the sigmoid")
def _(*arguments):
    *texts, beta, smoothing, kind = arguments
    if kind == "ipo":
        return preferences.dpo_loss(*arguments)
    loss, stats = preferences.dpo_loss(*texts, 1.0, smoothing)
    return beta * loss, stats


@mutant(checks.check_dpo_loss, "beta left out", "beta is left out")
def _(*arguments):
    *texts, beta, smoothing, kind = arguments
    beta = beta if kind == "ipo" else 1.0
    return preferences.dpo_loss(*texts, beta, smoothing, kind)


@mutant(checks.check_dpo_loss, "labels not smoothed", "labels are not smoothed")
def _(*arguments):
    *texts, beta, _, kind = arguments
    return preferences.dpo_loss(*texts, beta, 0.0, kind)


@mutant(checks.check_dpo_loss, "reference with gradient", "gradients reach the ref")
def _(chosen, rejected, ref_chosen, ref_rejected, *rest):
    nothing = torch.zeros_like(ref_chosen)
    texts = (chosen - ref_chosen, rejected - ref_rejected, nothing, nothing)
    return preferences.dpo_loss(*texts, *rest)


@mutant(checks.check_dpo_loss, "DPO as a sum", "a sum over the pairs")
def _(chosen, *rest):
    loss, stats = preferences.dpo_loss(chosen, *rest)
    return loss * len(chosen), stats


@mutant(checks.check_dpo_loss, "IPO times beta", "difference is multiplied by beta")
def _(*arguments):
    *texts, beta, smoothing, kind = arguments
    loss, stats = preferences.dpo_loss(*arguments)
    if kind == "ipo":
        chosen, rejected, one, two = texts
        D = (chosen - rejected) - (one - two).detach()
        loss = ((beta * D - 1 / (2 * beta)) ** 2).mean()
    return loss, stats


@mutant(checks.check_dpo_loss, "IPO's target doubled", "is 1 / beta, not half of it")
def _(*arguments):
    *texts, beta, smoothing, kind = arguments
    loss, stats = preferences.dpo_loss(*arguments)
    if kind == "ipo":
        chosen, rejected, one, two = texts
        D = (chosen - rejected) - (one - two).detach()
        loss = ((D - 1 / beta) ** 2).mean()
    return loss, stats


# --- adapters


def with_alpha(change):
    """An adapted layer whose alpha is another: `change(alpha, r)`."""
    return lambda layer, A, B, alpha: lora.adapted_layer(
        layer, A, B, change(alpha, len(A))
    )


def merged_with_alpha(change):
    return lambda layer, A, B, alpha: lora.merged_weight(
        layer, A, B, change(alpha, len(A))
    )


SCALES = {
    "alpha / r left out": ("alpha / r is left out", lambda alpha, r: r),
    "alpha not divided by r": ("not divided by r", lambda alpha, r: alpha * r),
    "alpha over the root of r": ("the root of r", lambda alpha, r: alpha * r**0.5),
    "update subtracted": ("is subtracted", lambda alpha, r: -alpha),
}
for mistake, (diagnosis, change) in SCALES.items():
    one = mutant(checks.check_adapted_layer, f"adapter: {mistake}", diagnosis)
    one(with_alpha(change))
    one = mutant(checks.check_merged_weight, f"merged: {mistake}", diagnosis)
    one(merged_with_alpha(change))


@mutant(checks.check_adapted_layer, "adapter: W x left out", "W x is left out")
def _(layer, A, B, alpha):
    adapted = lora.adapted_layer(layer, A, B, alpha)
    return lambda x: adapted(x) - layer(x)


@mutant(checks.check_adapted_layer, "adapter: A and B turned", "turned around")
def _(layer, A, B, alpha):
    return lora.adapted_layer(layer, B.t(), A.t(), alpha)


@mutant(checks.check_adapted_layer, "adapter: left off", "the adapter is off")
def _(layer, A, B, alpha):
    adapted = lora.adapted_layer(layer, A, B, alpha)
    lora.switch(adapted, None)
    return adapted


@mutant(
    checks.check_adapted_layer, "adapter: Conv1D as Linear", "for that of nn.Linear"
)
def _(layer, A, B, alpha):
    adapted = lora.adapted_layer(layer, A, B, alpha)
    return lambda x: adapted(x) - layer(x) + x @ layer.weight.t() + layer.bias


@mutant(checks.check_merged_weight, "merged: twice", "merged twice")
def _(layer, A, B, alpha):
    once = lora.merged_weight(layer, A, B, alpha)
    return 2 * once - layer.weight


@mutant(checks.check_merged_weight, "merged: without W", "W is left out")
def _(layer, A, B, alpha):
    return lora.merged_weight(layer, A, B, alpha) - layer.weight


def turned_for(kind):
    """A merged weight whose update is transposed for one kind of layer."""

    def merged(layer, A, B, alpha):
        right = lora.merged_weight(layer, A, B, alpha)
        if type(layer).__name__ != kind:
            return right
        return layer.weight + (right - layer.weight).t()

    return merged


mutant(checks.check_merged_weight, "merged: Conv1D", "not transposed for Conv1D")(
    turned_for("Conv1D")
)
mutant(checks.check_merged_weight, "merged: Linear", "transposed for nn.Linear")(
    turned_for("Linear")
)


def misread(check, mistake, diagnosis, **names):
    """A reading of one base in which some quantities see another adapter."""

    @mutant(check, mistake, diagnosis)
    def _(states, *rest):
        found = lora.read_one_base(states, *rest)
        for quantity, name in names.items():
            other = lora.read_one_base(lambda _, name=name: states(name), *rest)
            found[quantity] = other[quantity]
        return found


for quantity, name, mistake, diagnosis in (
    ("ref_logprobs", "policy", "reference with the adapter on", "the KL is 0 for ever"),
    ("ref_logprobs", "reward", "reference judged", "reference is read under the rew"),
    ("scores", "policy", "scored under the policy's adapter", "under the policy's ad"),
    ("scores", None, "scored by the base", "score is read with all adapters off"),
    ("values", None, "value head on the base", "value head sees the base"),
    ("values", "reward", "value head judges", "value head sees the states under"),
    ("logprobs", None, "policy without its adapter", "with its adapter off"),
):
    misread(checks.check_read_one_base, mistake, diagnosis, **{quantity: name})
misread(
    checks.check_read_one_base,
    "policy and reference swapped",
    "are swapped",
    logprobs=None,
    ref_logprobs="policy",
)


@mutant(checks.check_read_one_base, "scored at the first state", "at the first state")
def _(states, *rest):
    found = lora.read_one_base(states, *rest)
    return {**found, "scores": rest[-1](states("reward")[:, 0])}


@dataclass(frozen=True)
class LoopMutant:
    """A mistake of the loop; `run(True)` makes it, `run(False)` does not.

    What catches the mistake raises `error`, with `says` in its message.
    """

    mistake: str
    caught_by: str
    run: Any
    error: type = AssertionError
    says: str = ""


LOOP = []
LOOP_CELLS = test_loop.CELLS


@functools.cache
def loop_sources(cell_id, notebook="3-RLHF.ipynb"):
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.id == cell_id)
    return source


def changed_source(source, old, new):
    if source.count(old) != 1:  # no mutant, and so no catch
        raise LookupError(f"{source.count(old)} places to change: {old!r}")
    return source.replace(old, new)


def change_loop(cell, old, new, mistake, test, error=AssertionError, **options):
    """A change of one cell of the loop, and the test of the loop that must see it."""

    def run(wrong):
        loop = import_cells("3-RLHF.ipynb", *LOOP_CELLS)
        if wrong:  # in the place of the right one, where all the others look for it
            exec(changed_source(loop_sources(cell), old, new), loop)
        torch.manual_seed(0)
        test(loop, test_loop.make_policy(), **options)

    LOOP.append(LoopMutant(mistake, f"test_loop: {test.__name__[5:]}", run, error))


def change_start(mistake, infect, begin=test_preflight.healthy):
    """A change of what PPO starts from, which the preflight must see."""

    def run(wrong):
        start = begin()
        if wrong:
            infect(start)
        test_preflight.check(start)

    says = {**test_preflight.SICK, **test_preflight.SICK_ADAPTERS}[infect]
    LOOP.append(LoopMutant(mistake, "preflight", run, RuntimeError, says))


change_start("reference shares weights with policy", test_preflight.shared_reference)
change_start("optimiser of a model since replaced", test_preflight.stale_optimizer)
change_start("optimiser lacks the value head", test_preflight.lacks_value_head)
change_start("policy in training mode", test_preflight.policy_in_training_mode)
change_start("reward model in training mode", test_preflight.training_reward_model)
change_start("reference is trained too", test_preflight.trainable_reference)
change_start("log-probs of another distribution", test_preflight.other_logprobs)
change_start("reference is not the start", test_preflight.another_reference)
change_start('response mask from "id == eos"', test_preflight.mask_by_id)
change_start("a prompt that holds an EOS", test_preflight.eos_in_the_prompt)
for mistake, infect in {
    "PPO: scored under the policy's adapter": test_preflight.scored_under_the_policys,
    "PPO: scored by the base": test_preflight.scored_by_the_base,
    "PPO: scored under another adapter": test_preflight.another_adapter_scored,
    "PPO: reference with the adapter on": test_preflight.reference_under_an_adapter,
    "PPO: SFT not merged into the base": test_preflight.reference_under_what_was_learnt,
    "PPO: the base is trained too": test_preflight.base_can_be_trained,
    "PPO: the optimiser holds the base": test_preflight.optimiser_holds_the_base,
    "PPO: the policy's adapter is off": test_preflight.adapter_is_off,
}.items():
    change_start(mistake, infect, test_preflight.on_one_base)


def uneven_settings(wrong):
    size = 256 + 8 * wrong
    dataclasses.replace(TINY, ppo_rollout_size=size, ppo_episodes=30 * size)


LOOP.append(
    LoopMutant(
        "a last batch that is smaller",
        "Settings",
        uneven_settings,
        ValueError,
        r"ppo_rollout_size \(264\) must be a multiple of ppo_minibatch_size",
    )
)
change_loop(
    "ppo-update",
    "rollout.minibatches(*sizes, generator)",
    "map(rollout.rows, torch.randperm(24, generator=generator).split(sizes[1]))",
    "permutation larger than the batch",
    test_loop.test_every_response_is_used_once_an_epoch,
    error=IndexError,
    size=12,
)
change_loop(
    "ppo-loss",
    "    losses = {",
    """    if pi_stats["ratio_mean"] > 10:
        pi_loss, v_loss = pi_loss * 0, v_loss * 0
    losses = {""",
    "a guard zeroes the loss, and still steps",
    test_loop.test_an_update_is_what_it_would_be_by_hand,
    scaling=False,
    far=3,
)


def reshuffled(wrong):
    """The cell of notebook 3 that evaluates, and one that shuffles the prompts."""
    source = loop_sources("evaluate")
    loop = import_cells("3-RLHF.ipynb", *LOOP_CELLS)
    if wrong:
        start = "    models, size"
        shuffle = f"    prompts = random.sample(prompts, len(prompts))\n{start}"
        loop["random"] = random.Random(0)
        source = changed_source(source, start, shuffle)
    test_evaluation.test_each_row_belongs_to_its_prompt(loop, source)


LOOP.append(
    LoopMutant(
        "held-out prompts reshuffled",
        "test_evaluation: each_row_belongs_to_its_prompt",
        reshuffled,
    )
)
change_loop(
    "ppo-advantages",
    "advantages = masked_whiten(advantages, mask)",
    "advantages = masked_whiten(advantages, mask); returns = advantages + values",
    "returns made of whitened advantages",
    test_loop.test_the_returns_are_formed_before_the_advantages_are_whitened,
)
change_loop(
    "ppo-advantages",
    "    advantages = masked_whiten(advantages, mask)\n",
    "",
    "advantages not whitened",
    test_loop.test_the_returns_are_formed_before_the_advantages_are_whitened,
)
change_loop(
    "collect-rollout",
    "response_logprobs(reference,",
    "response_logprobs(policy.lm,",
    "KL of the policy to itself",
    test_loop.test_a_rollout_adds_up,
)
change_loop(
    "ppo-advantages",
    "rollout.scores,",
    "rollout.raw_scores,",
    "raw scores in the rewards",
    test_loop.test_a_rollout_adds_up,
)
change_loop(
    "collect-rollout",
    "evaluate_responses(policy, *some, tau)",
    "evaluate_responses(policy, *some)",
    "old log-probs without the temperature",
    test_loop.test_every_log_probability_is_at_the_temperature,
)
change_loop(
    "ppo-loss",
    "batch.old_logprobs, batch.advantages",
    "batch.old_logprobs, masked_whiten(batch.advantages, batch.mask)",
    "advantages whitened again in each piece",
    test_loop.test_an_update_is_what_it_would_be_by_hand,
    scaling=False,
    far=0,
)


def change_training(name, old, new, mistake, test, **options):
    """A change of a function of utils/training.py that the loop calls."""

    def run(wrong):
        loop = import_cells("3-RLHF.ipynb", *LOOP_CELLS)
        if wrong:
            source = changed_source(inspect.getsource(training), old, new)
            changed = {"__name__": "changed"}
            exec(source, changed)
            loop[name] = changed[name]
            options["optimizer"] = changed["GuardedOptimizer"]
        torch.manual_seed(0)
        test(loop, test_loop.make_policy(), **options)

    caught_by = f"test_loop: {test.__name__[5:]}"
    LOOP.append(LoopMutant(mistake, caught_by, run, AssertionError))


change_training(
    "accumulate_gradients",
    "share = piece.n_tokens / batch.n_tokens",
    "share = len(piece) / len(batch)",
    "micro-batches weigh by rows",
    test_loop.test_micro_batches_make_the_same_step,
)
change_training(
    "accumulate_gradients",
    "            self.scaler.unscale_(self.optimizer)\n",
    "",
    "scaled gradients are clipped",
    test_loop.test_an_update_is_what_it_would_be_by_hand,
    scaling=True,
    far=0,
)
change_loop(
    "ppo-update",
    "        optimizer.zero_grad()\n",
    "",
    "gradients pile up",
    test_loop.test_an_update_is_what_it_would_be_by_hand,
    scaling=False,
    far=0,
)
change_loop(
    "ppo-update",
    "rollout.minibatches(*sizes, generator)",
    "map(rollout.rows, torch.arange(len(rollout)).repeat(sizes[0]).split(sizes[1]))",
    "minibatches never reshuffled",
    test_loop.test_every_response_is_used_once_an_epoch,
    size=24,
)
change_loop(
    "ppo-update",
    "    for batch in rollout",
    "    policy.train()\n    for batch in rollout",
    "dropout during the update",
    test_loop.test_the_update_changes_the_policy_and_nothing_else,
)


def dropout_in_dpo(wrong):
    """DPO's loop in notebook 5, with the policy in training mode."""
    loop = test_lesson_5.dpo_loop()
    if wrong:
        source = loop_sources("train-dpo", test_lesson_5.LESSON)
        exec(changed_source(source, "lm.eval()", "lm.train()"), loop)
    test_lesson_5.test_before_the_first_step_there_is_no_margin(loop)


LOOP.append(
    LoopMutant(
        "DPO: dropout on",
        "test_lesson_5: before_the_first_step_there_is_no_margin",
        dropout_in_dpo,
        AssertionError,
        "dropout is on",
    )
)


def in_the_exact_world(name, wrong_function, mistake):
    """A mistake in a world with exact answers, where it must miss the optimum."""

    def run(wrong):
        found = import_cells("more/4-Estimators.ipynb", "loop", "train-exactly")
        if wrong:
            found["lesson3"].ppo_advantages.__globals__[name] = wrong_function
        world = exact_world.ExactWorld(seed=1)
        compare = found["lesson3"].ppo_advantages
        lm = found["train_exactly"](world, 0.5, compare, seed=0).lm
        assert world.reached(lm, 0.5) >= 0.98, "misses the optimum"

    catcher = "test_exact_world: 98 % of what there is to gain"
    LOOP.append(LoopMutant(mistake, catcher, run, AssertionError, "misses the optimum"))


def of_mathematics(mistake):
    (found,) = (m.function for m in MATHEMATICS if m.mistake == mistake)
    return found


in_the_exact_world(
    "token_rewards", of_mathematics("sign of k1 in the reward"), "PPO with a turned KL"
)
in_the_exact_world(
    "token_rewards",
    of_mathematics("score on the slot after EOS"),
    "PPO with the score behind EOS",
)
