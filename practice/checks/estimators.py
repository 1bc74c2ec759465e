"""Checks of the advantages of whole responses, and of GRPO's loss."""

import statistics

import torch

from practice.checks.comparison import check


def _groups(case, prompts=3, k=4):
    """Scores of k responses to each prompt, each prompt with a level of its own."""
    levels = 3 * case.normal(prompts, 1)
    groups = levels + case.normal(prompts, k) * torch.tensor([[0.5], [1.0], [2.0]])
    return lambda function: {"advantages": function(groups.flatten(), k)}


def _of_each(advantage):
    """Advantages of scores by `advantage(own, others)`, one response at a time."""

    def advantages(scores, k):
        groups = [group.tolist() for group in scores.split(k)]
        found = [
            advantage(own, group[:i] + group[i + 1 :])
            for group in groups
            for i, own in enumerate(group)
        ]
        return torch.tensor(found, dtype=scores.dtype)

    return advantages


def _mistakes_of_groups(right):
    """What goes wrong with any comparison within a group."""

    def across(scores, k):
        found = right(scores.view(k, -1).t().flatten(), k)
        return found.view(-1, k).t().flatten()

    return {
        "the groups go across the prompts, as if these came round and round": across,
        "all responses are one group, whatever their prompt": (
            lambda scores, k: right(scores, len(scores))
        ),
        "the sign is turned: worse responses become likelier": (
            lambda scores, k: -right(scores, k)
        ),
    }


def _less_the_others(own, others):
    return own - statistics.mean(others)


def _less_all(own, others):
    return own - statistics.mean([own, *others])


def _over(spread, difference=_less_all):
    """The difference divided by the spread of the group."""
    return lambda own, others: difference(own, others) / (spread([own, *others]) + 1e-4)


_rloo, _grpo = _of_each(_less_the_others), _of_each(_over(statistics.stdev))
RLOO = {
    "the baseline is the mean of all k, its own score among them": _of_each(_less_all),
    "there is no baseline": lambda scores, k: scores,
    "it is divided by the spread of the group, as in GRPO": (
        _of_each(_over(statistics.stdev, _less_the_others))
    ),
    "the sum of the others is divided by k, not by k - 1": (
        _of_each(lambda own, others: own - sum(others) / (len(others) + 1))
    ),
    **_mistakes_of_groups(_rloo),
}
GRPO = {
    "it is not divided by the spread of the group": _of_each(_less_all),
    "the spread is that of the whole batch, not of the group": (
        lambda scores, k: _of_each(_less_all)(scores, k) / (scores.std() + 1e-4)
    ),
    "the variance is divided by k, not by k - 1": _of_each(_over(statistics.pstdev)),
    "the divisor is the variance, not its root": _of_each(_over(statistics.variance)),
    "the baseline is the mean of the others, as in RLOO": (
        _of_each(_over(statistics.stdev, _less_the_others))
    ),
    **_mistakes_of_groups(_grpo),
}


@check(_rloo, RLOO)
def check_rloo_advantages(case):
    """`rloo_advantages(scores, group_size)` -> (B,)."""
    return _groups(case)


@check(_grpo, GRPO)
def check_grpo_advantages(case):
    """`grpo_advantages(scores, group_size)` -> (B,), divided by the group's spread."""
    return _groups(case)


def _k3(ratio):
    return torch.exp(-ratio) - 1 + ratio


def _loss(
    new,
    old,
    ref,
    advantages,
    mask,
    clip,
    beta,
    mean,
    price=lambda beta: beta,
    kl=_k3,
    pick=torch.maximum,
    divisor=None,
):
    """GRPO's loss, response by response; the rest says what a mistake changes."""
    total, lengths = 0.0, mask.sum(dim=1)
    for b, n in enumerate(lengths.tolist()):
        ratio = torch.exp(new[b, :n] - old[b, :n])
        clipped = ratio.clamp(1 - clip, 1 + clip)
        each = pick(-advantages[b] * ratio, -advantages[b] * clipped)
        each = each + price(beta) * kl(new[b, :n] - ref[b, :n])
        over = n * len(mask) if mean == "response" else lengths.sum()
        total = total + each.sum() / (divisor or over)
    return total


LOSS = {
    "the KL has the wrong sign: it is paid for, not charged": {
        "price": lambda beta: -beta
    },
    "the KL is counted twice": {"price": lambda beta: 2 * beta},
    "the KL is left out": {"price": lambda beta: 0},
    "k3 takes the log-ratio reversed": {"kl": lambda ratio: _k3(-ratio)},
    "k1 stands for k3: its gradient is 0 on average": {"kl": lambda ratio: ratio},
    "min stands for max": {"pick": torch.minimum},
    "each token weighs the same, also with mean by response": (
        lambda *x, mean: _loss(*x, mean="token")
    ),
    "each response weighs the same, also with mean by token": (
        lambda *x, mean: _loss(*x, mean="response")
    ),
    "the sum is divided by all slots, padding too": (
        lambda *x, mean: _loss(*x, mean=mean, divisor=x[4].numel())
    ),
}


@check(_loss, LOSS)
def check_grpo_loss(case):
    """`grpo_loss(logprobs, old, ref, advantages, mask, clip_range, kl_coef, mean)`.

    Loss and gradient with respect to `logprobs`, for both means.
    """
    numbers = case.uniform(0.1, 0.3), case.uniform(0.2, 0.6)
    old, ref = -1 - case.normal().abs(), -1 - case.normal().abs()
    new, advantages = old + 0.3 * case.normal(), case.normal(len(case.mask))
    # In the longest response: far up and far down
    new[1, :2] = old[1, :2] + case.uniform(0.5, 0.7) * torch.tensor([1.0, -1.0])
    rest = (old, ref, advantages, case.mask, *numbers)

    def measure(function):
        got = {}
        for mean in ("response", "token"):
            leaf = new.clone().requires_grad_()
            found = function(leaf, *rest, mean=mean)
            value = found[0] if isinstance(found, tuple) else found
            gradient = torch.zeros_like(leaf)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf)
            got |= {f"loss by {mean}": value, f"gradient by {mean}": gradient}
        return got

    return measure
