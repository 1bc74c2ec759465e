"""Checks of the reward of each token and of the KL estimators."""

import math

import torch

from utils.practice.checks.case import Case
from utils.practice.checks.comparison import Result, compare, name_of


def _k3(ratio):
    return math.exp(-ratio) - 1 + ratio


def check_token_rewards(function, seed: int = 0) -> Result:
    """`token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)` -> (B, T)."""
    case = Case(seed)
    logprobs, ref = -case.normal().abs(), -case.normal().abs()
    scores, beta = case.normal(len(case.lengths)), case.uniform(0.1, 0.5)

    def rewards(price=-beta, place=lambda n: n - 1, kl=lambda ratio: ratio):
        """Rewards of all slots, the score at slot `place(n)` of a response's n tokens.

        Where that slot does not exist, the score is lost.
        """
        table = torch.zeros(case.mask.shape, dtype=torch.float64)
        for b, (new, old) in enumerate(case.rows(logprobs, ref)):
            for t, ratio in enumerate(a - b for a, b in zip(new, old, strict=True)):
                table[b, t] = price * kl(ratio)
            if 0 <= place(len(new)) < case.width:
                table[b, place(len(new))] += scores[b]
        return table

    right, no_score = rewards(), rewards(place=lambda n: -1)
    last = case.width - 1
    behind = "the score stands on the slot after EOS"
    mistakes = [
        ("the sign of the KL is turned", rewards(price=beta)),
        (behind, rewards(place=lambda n: n)),
        (behind, rewards(place=lambda n: min(n, last))),
        (
            "the score stands on the last slot, padding or not",
            rewards(place=lambda n: last),
        ),
        ("the score stands on the first token", rewards(place=lambda n: 0)),
        ("every token gets the score", no_score + scores[:, None] * case.mask),
        ("the score is left out", no_score),
        ("the KL coefficient is left out", rewards(price=-1.0)),
        ("the KL penalty is left out", rewards(price=0.0)),
        (
            "padding pays for its KL, too",
            torch.where(case.mask.bool(), right, -beta * (logprobs - ref)),
        ),
        (
            "k3 stands for k1; only k1 adds up to the response's log-ratio",
            rewards(kl=_k3),
        ),
    ]
    return compare(
        name_of(function),
        lambda: {"rewards": function(scores, logprobs, ref, case.mask, beta)},
        {"rewards": right},
        [(sentence, {"rewards": value}) for sentence, value in mistakes],
    )


def check_kl_estimate(function, seed: int = 0) -> Result:
    """`kl_estimate(logprobs, ref_logprobs, kind)` for k1, k2 and k3.

    On every word of a small vocabulary, so that the means under the policy can be
    compared with the exact KL, summed over the words.
    """
    case = Case(seed)
    p, q = case.normal(3, 5).softmax(dim=-1), case.normal(3, 5).softmax(dim=-1)
    pairs = [
        zip(*rows, strict=True) for rows in zip(p.tolist(), q.tolist(), strict=True)
    ]
    words = [[(a, math.log(a / b)) for a, b in row] for row in pairs]
    exact = [sum(a * ratio for a, ratio in row) for row in words]

    def each(estimate):
        rows = [[estimate(ratio) for _, ratio in row] for row in words]
        return torch.tensor(rows, dtype=torch.float64)

    expected = {
        "k1": each(lambda ratio: ratio),
        "k2": each(lambda ratio: ratio**2 / 2),
        "k3": each(_k3),
        "mean of k1": exact,
        "mean of k3": exact,
    }
    mistakes = [
        ("the sign of k1 is turned", {"k1": each(lambda ratio: -ratio)}),
        ("k1 is made positive; only its mean is", {"k1": each(abs)}),
        ("the factor 1/2 of k2 is left out", {"k2": each(lambda ratio: ratio**2)}),
        (
            "k3 takes the log-ratio reversed; its mean is then not KL(pi || pi_ref)",
            {"k3": each(lambda ratio: _k3(-ratio))},
        ),
        ("k3 lacks its last term", {"k3": each(lambda ratio: _k3(ratio) - ratio)}),
        ("the sign of k3 is turned", {"k3": each(lambda ratio: -_k3(ratio))}),
    ]

    def call():
        got = {kind: function(p.log(), q.log(), kind) for kind in ("k1", "k2", "k3")}
        means = {f"mean of {kind}": (p * got[kind]).sum(1) for kind in ("k1", "k3")}
        return {**got, **means}

    return compare(name_of(function), call, expected, mistakes)


def check_shaped_rewards(function, seed: int = 0) -> Result:
    """`shaped_rewards(rewards, potentials, mask, gamma)` -> (B, T)."""
    case = Case(seed)
    rewards, potentials = case.normal(), case.normal()
    gamma = case.uniform(0.6, 0.95)

    def shaped(bonus):
        """r_t + bonus(Phi_t, Phi_{t+1}), where Phi is 0 after the last token."""
        rows = []
        for r, phi in case.rows(rewards, potentials):
            behind = [*phi[1:], 0.0]
            rows.append([x + bonus(*y) for x, *y in zip(r, phi, behind, strict=True)])
        return case.table(rows)

    def right(now, then):
        return gamma * then - now

    filler = torch.nn.functional.pad(potentials[:, 1:], (0, 1))
    mistakes = [
        ("the sign is turned", shaped(lambda now, then: now - gamma * then)),
        ("gamma is left out", shaped(lambda now, then: then - now)),
        (
            "what stands behind the last token is counted, padding or not",
            case.mask * (rewards + gamma * filler - potentials),
        ),
        (
            "it is a bonus: the potential before the token is not taken away",
            shaped(lambda now, then: gamma * then),
        ),
        (
            "the potentials are one place late: before the token, not after it",
            shaped(lambda now, then: gamma * now)
            - case.table([[0, *p[:-1]] for (p,) in case.rows(potentials)]),
        ),
        ("the reward itself is left out", shaped(right) - case.mask * rewards),
        ("padding is shaped, too", rewards + gamma * filler - potentials),
    ]
    return compare(
        name_of(function),
        lambda: {"rewards": function(rewards, potentials, case.mask, gamma)},
        {"rewards": shaped(right)},
        [(said, {"rewards": wrong}) for said, wrong in mistakes],
    )
