"""Checks of the reward of each token and of the KL estimators."""

import torch

from practice.checks.comparison import check


def _k3(ratio):
    return torch.exp(-ratio) - 1 + ratio


def _rewards(
    scores,
    logprobs,
    ref,
    mask,
    kl_coef,
    price=lambda kl_coef: kl_coef,
    kl=lambda ratio: ratio,
    place=lambda n, width: n - 1,
):
    """Each token pays for its KL; the score at slot `place(n, T)` of n tokens.

    Where that slot does not exist, the score is lost.
    """
    rewards = -price(kl_coef) * kl(logprobs - ref) * mask
    for row, score, n in zip(rewards, scores, mask.sum(dim=1).tolist(), strict=True):
        if 0 <= place(n, len(row)) < len(row):
            row[place(n, len(row))] += score
    return rewards


REWARDS = {
    "the sign of the KL is turned": {"price": lambda beta: -beta},
    "the score stands on the slot after EOS": [
        {"place": lambda n, width: n},
        {"place": lambda n, width: min(n, width - 1)},
    ],
    "the score stands on the last slot, padding or not": {
        "place": lambda n, width: width - 1
    },
    "the score stands on the first token": {"place": lambda n, width: 0},
    "every token gets the score": (
        lambda scores, new, ref, mask, beta: (
            (scores[:, None] - beta * (new - ref)) * mask
        )
    ),
    "the score is left out": {"place": lambda n, width: -1},
    "the KL coefficient is left out": {"price": lambda beta: 1},
    "the KL penalty is left out": {"price": lambda beta: 0},
    "padding pays for its KL, too": (
        lambda scores, new, ref, mask, beta: (
            _rewards(scores, new, ref, mask, beta) - beta * (new - ref) * (1 - mask)
        )
    ),
    "k3 stands for k1; only k1 adds up to the response's log-ratio": {"kl": _k3},
}


@check(_rewards, REWARDS)
def check_token_rewards(case):
    """`token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)` -> (B, T)."""
    logprobs, ref = -case.normal().abs(), -case.normal().abs()
    scores, beta = case.normal(len(case.mask)), case.uniform(0.1, 0.5)

    def measure(function):
        tensors = (x.clone() for x in (scores, logprobs, ref, case.mask))
        return {"rewards": function(*tensors, beta)}

    return measure


def _estimates(**changed):
    """The three estimators, some of them changed."""
    kinds = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": _k3, **changed}
    return lambda logprobs, ref_logprobs, kind: kinds[kind](logprobs - ref_logprobs)


ESTIMATES = {
    "the sign of k1 is turned": _estimates(k1=lambda ratio: -ratio),
    "k1 is made positive; only its mean is": _estimates(k1=abs),
    "the factor 1/2 of k2 is left out": _estimates(k2=lambda ratio: ratio**2),
    "k3 takes the log-ratio reversed; its mean is then not KL(pi || pi_ref)": (
        _estimates(k3=lambda ratio: _k3(-ratio))
    ),
    "k3 lacks its last term": _estimates(k3=lambda ratio: torch.exp(-ratio) - 1),
    "the sign of k3 is turned": _estimates(k3=lambda ratio: -_k3(ratio)),
}


@check(_estimates(), ESTIMATES)
def check_kl_estimate(case):
    """`kl_estimate(logprobs, ref_logprobs, kind)` for k1, k2 and k3.

    On every word of small vocabularies, so that the means under the policy are held
    against the exact KL, too: there k1 and k3 are right on average.
    """
    p, q = (case.normal(3, 5).softmax(dim=-1) for _ in range(2))
    exact = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(dim=1)

    def measure(function):
        got = {k: function(p.log(), q.log(), k) for k in ("k1", "k2", "k3")}
        errors = {k: (p * got[k]).sum(dim=1) - exact for k in ("k1", "k3")}
        return got | {f"mean of {k} less the exact KL": x for k, x in errors.items()}

    return measure
