"""Checks of the advantages of whole responses, and of GRPO's loss."""

import math
import statistics

import torch

from utils.practice.checks.case import Case, mean_of
from utils.practice.checks.comparison import Result, compare, name_of


def _grouped(case, prompts=3, k=4):
    """Scores of k responses to each prompt, each prompt with a level of its own."""
    levels = 3 * case.normal(prompts, 1)
    return levels + case.normal(prompts, k) * torch.tensor([[0.5], [1.0], [2.0]])


def _each(groups, advantage):
    """`advantage(own, others)` for every response, in the order of the scores."""
    rows = groups.tolist()
    return [
        advantage(own, row[:i] + row[i + 1 :])
        for row in rows
        for i, own in enumerate(row)
    ]


def _advantages_mistakes(groups, advantage):
    """What goes wrong with any comparison within a group."""
    prompts, k = groups.shape
    strided = groups.flatten().view(k, prompts).t()
    found = torch.tensor(_each(strided, advantage), dtype=groups.dtype)
    return [
        (
            "the groups go across the prompts, as if these came round and round",
            found.view(prompts, k).t().flatten(),
        ),
        (
            "all responses are one group, whatever their prompt",
            _each(groups.view(1, -1), advantage),
        ),
        (
            "the sign is turned: worse responses become likelier",
            [-x for x in _each(groups, advantage)],
        ),
    ]


def _compare_advantages(function, groups, right, own):
    scores, k = groups.flatten(), groups.shape[1]
    mistakes = [(said, _each(groups, one)) for said, one in own]
    mistakes += _advantages_mistakes(groups, right)
    return compare(
        name_of(function),
        lambda: {"advantages": function(scores, k)},
        {"advantages": torch.tensor(_each(groups, right))},
        [(said, {"advantages": torch.as_tensor(x)}) for said, x in mistakes],
    )


def check_rloo_advantages(function, seed: int = 0) -> Result:
    """`rloo_advantages(scores, group_size)` -> (B,)."""
    groups = _grouped(Case(seed))

    def right(own, others):
        return own - mean_of(others)

    own = [
        (
            "the baseline is the mean of all k, its own score among them",
            lambda own, others: own - mean_of([own, *others]),
        ),
        ("there is no baseline", lambda own, others: own),
        (
            "it is divided by the spread of the group, as in GRPO",
            lambda own, others: (
                right(own, others) / (statistics.stdev([own, *others]) + 1e-4)
            ),
        ),
        (
            "the sum of the others is divided by k, not by k - 1",
            lambda own, others: own - sum(others) / (len(others) + 1),
        ),
    ]
    return _compare_advantages(function, groups, right, own)


def check_grpo_advantages(function, seed: int = 0) -> Result:
    """`grpo_advantages(scores, group_size)` -> (B,), divided by the group's spread."""
    groups = _grouped(Case(seed))
    batch = statistics.stdev(groups.flatten().tolist())

    def centred(own, others):
        return own - mean_of([own, *others])

    def right(own, others):
        return centred(own, others) / (statistics.stdev([own, *others]) + 1e-4)

    own = [
        ("it is not divided by the spread of the group", centred),
        (
            "the spread is that of the whole batch, not of the group",
            lambda own, others: centred(own, others) / (batch + 1e-4),
        ),
        (
            "the variance is divided by k, not by k - 1",
            lambda own, others: (
                centred(own, others) / (statistics.pstdev([own, *others]) + 1e-4)
            ),
        ),
        (
            "the divisor is the variance, not its root",
            lambda own, others: (
                centred(own, others) / (statistics.variance([own, *others]) + 1e-4)
            ),
        ),
        (
            "the baseline is the mean of the others, as in RLOO",
            lambda own, others: (
                (own - mean_of(others)) / (statistics.stdev([own, *others]) + 1e-4)
            ),
        ),
    ]
    return _compare_advantages(function, groups, right, own)


def check_grpo_loss(function, seed: int = 0) -> Result:
    """`grpo_loss(logprobs, old, ref, advantages, mask, clip_range, kl_coef, mean)`.

    Loss and gradient with respect to `logprobs`, for both means.
    """
    case = Case(seed)
    clip, beta = case.uniform(0.1, 0.3), case.uniform(0.2, 0.6)
    old, ref = -1 - case.normal().abs(), -1 - case.normal().abs()
    new, advantages = old + 0.3 * case.normal(), case.normal(len(case.lengths))
    # In the longest response: far up and far down
    new[1, :2] = old[1, :2] + case.uniform(0.5, 0.7) * torch.tensor([1.0, -1.0])
    rows, h = case.rows(new, old, ref), 1e-5

    def k3(ratio):
        return math.exp(-ratio) - 1 + ratio

    def loss(mean, price=beta, kl=k3, turn=1, weigh=None, pick=max):
        def token(x, old, ref, A):
            ratio = math.exp(x - old)
            near = min(max(ratio, 1 - clip), 1 + clip)
            return pick(-A * ratio, -A * near) + price * kl(turn * (x - ref))

        total, slopes = 0.0, []
        for row, A, n in zip(rows, advantages.tolist(), case.lengths, strict=True):
            weight = {"response": 1 / (n * len(rows)), "token": 1 / case.n_tokens}[mean]
            weight = weigh(n) if weigh else weight
            tokens = list(zip(*row, strict=True))
            total += sum(weight * token(*one, A) for one in tokens)
            slopes.append(
                [
                    weight * (token(x + h, *y, A) - token(x - h, *y, A)) / (2 * h)
                    for x, *y in tokens
                ]
            )
        return {f"loss by {mean}": total, f"gradient by {mean}": case.table(slopes)}

    def both(**changes):
        return {**loss("response", **changes), **loss("token", **changes)}

    slots = case.mask.numel()
    mistakes = [
        ("the KL has the wrong sign: it is paid for, not charged", both(price=-beta)),
        ("the KL is counted twice", both(price=2 * beta)),
        ("the KL is left out", both(price=0.0)),
        ("k3 takes the log-ratio reversed", both(turn=-1)),
        ("k1 stands for k3: its gradient is 0 on average", both(kl=lambda x: x)),
        ("min stands for max", both(pick=min)),
        (
            "each token weighs the same, also with mean by response",
            loss("response", weigh=lambda n: 1 / case.n_tokens),
        ),
        (
            "each response weighs the same, also with mean by token",
            loss("token", weigh=lambda n: 1 / (n * len(rows))),
        ),
        (
            "the sum is divided by all slots, padding too",
            both(weigh=lambda n: 1 / slots),
        ),
    ]

    def call():
        got = {}
        for mean in ("response", "token"):
            x = new.clone().requires_grad_()
            arguments = (x, old, ref, advantages, case.mask, clip, beta)
            found = function(*arguments, mean=mean)
            value = found[0] if isinstance(found, tuple) else found
            gradient = torch.zeros_like(x)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, x)
            got |= {f"loss by {mean}": value, f"gradient by {mean}": gradient}
        return got

    return compare(name_of(function), call, both(), mistakes)
