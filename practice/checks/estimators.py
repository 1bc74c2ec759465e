"""Checks of the advantages of whole responses, and of GRPO's loss."""

import functools
from statistics import pstdev, stdev, variance

import torch

from practice.checks.comparison import check
from practice.checks.ppo import k3


def _advantages(
    scores, k, without=0, lost=0, base=1, spread=None, sign=1,
    rows=lambda places, k: places.view(-1, k),
):  # fmt: skip
    """Each score less a mean of its group, by the group's spread, one at a time.

    `without`: its own score is not in the sum, which is divided by k - `lost`.
    """
    found = torch.zeros_like(scores)
    for row in rows(torch.arange(len(scores)), k):
        group = scores[row].tolist()
        by = spread(group) + 1e-4 if spread else 1
        for i, own in zip(row, group, strict=True):
            mean = (sum(group) - without * own) / (len(group) - lost)
            found[i] = sign * (own - base * mean) / by
    return found


_rloo = functools.partial(_advantages, without=1, lost=1)
_grpo = functools.partial(_advantages, spread=stdev)
OF_GROUPS = {
    "the groups go across the prompts, as if these came round and round":
        {"rows": lambda places, k: places.view(k, -1).t()},
    "all responses are one group, whatever their prompt":
        {"rows": lambda places, k: places.view(1, -1)},
    "the sign is turned: worse responses become likelier": {"sign": -1},
}  # fmt: skip
RLOO = {
    "the baseline is the mean of all k, its own score among them":
        {"without": 0, "lost": 0},
    "there is no baseline": {"base": 0},
    "it is divided by the spread of the group, as in GRPO": {"spread": stdev},
    "the sum of the others is divided by k, not by k - 1": {"lost": 0},
    **OF_GROUPS,
}  # fmt: skip
GRPO = {
    "it is not divided by the spread of the group": {"spread": None},
    "the spread is that of the whole batch, not of the group":
        lambda scores, k: _grpo(scores, k, spread=lambda group: scores.std()),
    "the variance is divided by k, not by k - 1": {"spread": pstdev},
    "the divisor is the variance, not its root": {"spread": variance},
    "the baseline is the mean of the others, as in RLOO": {"without": 1, "lost": 1},
    **OF_GROUPS,
}  # fmt: skip


def _groups(case):
    """Scores of 4 responses to each of 3 prompts, each prompt with its own level."""
    spreads = torch.tensor([[0.5], [1.0], [2.0]])
    return (3 * case.normal(3, 1) + spreads * case.normal(3, 4)).flatten(), 4


@check(_rloo, RLOO, "advantages")
def check_rloo_advantages(case):
    """`rloo_advantages(scores, group_size)` -> (B,)."""
    return _groups(case)


@check(_grpo, GRPO, "advantages")
def check_grpo_advantages(case):
    """`grpo_advantages(scores, group_size)` -> (B,), divided by the group's spread."""
    return _groups(case)


def _loss(
    new, old, ref, A, mask, clip, beta, mean, kl=k3, pick=torch.maximum, slots=False
):
    """GRPO's loss, response by response; the rest says what a mistake changes."""
    total, lengths = 0.0, mask.sum(dim=1)
    for b, n in enumerate(lengths.tolist()):
        ratio = torch.exp(new[b, :n] - old[b, :n])
        each = pick(-A[b] * ratio, -A[b] * ratio.clamp(1 - clip, 1 + clip))
        each = each + beta * kl(new[b, :n] - ref[b, :n])
        over = n * len(mask) if mean == "response" else lengths.sum()
        total = total + each.sum() / (mask.numel() if slots else over)
    return total


LOSS = {
    "the KL has the wrong sign: it is paid for, not charged": {"kl": lambda x: -k3(x)},
    "the KL is counted twice": {"kl": lambda x: 2 * k3(x)},
    "the KL is left out": {"beta": 0},
    "k3 takes the log-ratio reversed": {"kl": lambda x: k3(-x)},
    "k1 stands for k3: its gradient is 0 on average": {"kl": torch.clone},
    "min stands for max": {"pick": torch.minimum},
    "each token weighs the same, also with mean by response": {"mean": "token"},
    "each response weighs the same, also with mean by token": {"mean": "response"},
    "the sum is divided by all slots, padding too": {"slots": True},
}


@check(_loss, LOSS, "loss", "gradient", leaves=1)
def check_grpo_loss(case):
    """`grpo_loss(logprobs, old, ref, advantages, mask, clip_range, kl_coef, mean)`."""
    numbers = case.uniform(0.1, 0.3), case.uniform(0.2, 0.6)
    old, ref = -1 - case.normal().abs(), -1 - case.normal().abs()
    new, advantages = old + 0.3 * case.normal(), case.normal(len(case.mask))
    # In the longest response: far up and far down
    new[1, :2] = old[1, :2] + case.uniform(0.5, 0.7) * torch.tensor([1.0, -1.0])
    given = (new, old, ref, advantages, case.mask, *numbers)
    return {f" by {mean}": (*given, mean) for mean in ("response", "token")}
