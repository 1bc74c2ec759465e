"""Checks of the advantages of whole responses, and of GRPO's loss."""

import statistics

import torch

from practice.checks.comparison import check, loss_and_gradient


def _groups(case, prompts=3, k=4):
    """Scores of k responses to each prompt, each prompt with a level of its own."""
    levels = 3 * case.normal(prompts, 1)
    groups = levels + case.normal(prompts, k) * torch.tensor([[0.5], [1.0], [2.0]])
    return groups.flatten(), k


def _of_each(advantage):
    """Advantages of scores by `advantage(own, others)`, one response at a time."""

    def advantages(scores, k):
        groups = [group.tolist() for group in scores.split(k)]
        each = ((g[i], g[:i] + g[i + 1 :]) for g in groups for i in range(len(g)))
        return torch.tensor([advantage(*x) for x in each], dtype=scores.dtype)

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
    """Advantages divided by the spread of the group."""
    return _of_each(
        lambda own, others: difference(own, others) / (spread([own, *others]) + 1e-4)
    )


_rloo, _grpo = _of_each(_less_the_others), _over(statistics.stdev)
_mixed = _over(statistics.stdev, _less_the_others)
RLOO = {
    "the baseline is the mean of all k, its own score among them": _of_each(_less_all),
    "there is no baseline": lambda scores, k: scores,
    "it is divided by the spread of the group, as in GRPO": _mixed,
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
    "the variance is divided by k, not by k - 1": _over(statistics.pstdev),
    "the divisor is the variance, not its root": _over(statistics.variance),
    "the baseline is the mean of the others, as in RLOO": _mixed,
    **_mistakes_of_groups(_grpo),
}


@check(_rloo, RLOO, "advantages")
def check_rloo_advantages(case):
    """`rloo_advantages(scores, group_size)` -> (B,)."""
    return _groups(case)


@check(_grpo, GRPO, "advantages")
def check_grpo_advantages(case):
    """`grpo_advantages(scores, group_size)` -> (B,), divided by the group's spread."""
    return _groups(case)


def _k3(ratio):
    return torch.exp(-ratio) - 1 + ratio


def _loss(
    new, old, ref, A, mask, clip, beta, mean, price=1, kl=_k3, pick=torch.maximum,
    by=None, slots=False,
):  # fmt: skip
    """GRPO's loss, response by response; the rest says what a mistake changes."""
    total, lengths = 0.0, mask.sum(dim=1)
    for b, n in enumerate(lengths.tolist()):
        ratio = torch.exp(new[b, :n] - old[b, :n])
        each = pick(-A[b] * ratio, -A[b] * ratio.clamp(1 - clip, 1 + clip))
        each = each + price * beta * kl(new[b, :n] - ref[b, :n])
        over = n * len(mask) if (by or mean) == "response" else lengths.sum()
        total = total + each.sum() / (mask.numel() if slots else over)
    return total


LOSS = {
    "the KL has the wrong sign: it is paid for, not charged": {"price": -1},
    "the KL is counted twice": {"price": 2},
    "the KL is left out": {"price": 0},
    "k3 takes the log-ratio reversed": {"kl": lambda ratio: _k3(-ratio)},
    "k1 stands for k3: its gradient is 0 on average": {"kl": torch.clone},
    "min stands for max": {"pick": torch.minimum},
    "each token weighs the same, also with mean by response": {"by": "token"},
    "each response weighs the same, also with mean by token": {"by": "response"},
    "the sum is divided by all slots, padding too": {"slots": True},
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
    given = (new, old, ref, advantages, case.mask, *numbers)

    def measure(function):
        got = {}
        for mean in ("response", "token"):
            found = loss_and_gradient(given, 1, function, mean=mean)
            got |= {f"{k} by {mean}": found[k] for k in ("loss", "gradient")}
        return got

    return measure
