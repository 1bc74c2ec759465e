"""Checks of the reward of each token and of the KL estimators."""

import torch

from practice.checks.comparison import check


def _k3(ratio):
    return torch.exp(-ratio) - 1 + ratio


def _rewards(
    scores, logprobs, ref, mask, beta, price=1, kl=torch.clone, place=None, outside=0
):
    """Each token pays for its KL; the score at slot `place(n, T)` of n tokens.

    Where that slot does not exist, the score is lost.
    """
    rewards = -price * beta * kl(logprobs - ref) * (mask + outside * (1 - mask))
    for row, score, n in zip(rewards, scores, mask.sum(dim=1).tolist(), strict=True):
        slot = place(n, len(row)) if place else n - 1
        if 0 <= slot < len(row):
            row[slot] += score
    return rewards


REWARDS = {
    "the sign of the KL is turned": {"price": -1},
    "the score stands on the slot after EOS": [
        {"place": lambda n, width: n},
        {"place": lambda n, width: min(n, width - 1)},
    ],
    "the score stands on the last slot, padding or not": {
        "place": lambda n, width: width - 1
    },
    "the score stands on the first token": {"place": lambda n, width: 0},
    "every token gets the score": lambda scores, *given: (
        _rewards(0 * scores, *given) + scores[:, None] * given[2]
    ),
    "the score is left out": {"place": lambda n, width: -1},
    "the KL coefficient is left out": lambda *given: _rewards(*given[:-1], 1),
    "the KL penalty is left out": {"price": 0},
    "padding pays for its KL, too": {"outside": 1},
    "k3 stands for k1; only k1 adds up to the response's log-ratio": {"kl": _k3},
}


@check(_rewards, REWARDS, "rewards")
def check_token_rewards(case):
    """`token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)` -> (B, T)."""
    logprobs, ref = -case.normal().abs(), -case.normal().abs()
    scores, beta = case.normal(len(case.mask)), case.uniform(0.1, 0.5)
    return scores, logprobs, ref, case.mask, beta


def _estimates(new, ref, kind, k1=torch.clone, k2=lambda x: x**2 / 2, k3=_k3):
    return {"k1": k1, "k2": k2, "k3": k3}[kind](new - ref)


ESTIMATES = {
    "the sign of k1 is turned": {"k1": torch.neg},
    "k1 is made positive; only its mean is": {"k1": abs},
    "the factor 1/2 of k2 is left out": {"k2": torch.square},
    "k3 takes the log-ratio reversed; its mean is then not KL(pi || pi_ref)": {
        "k3": lambda ratio: _k3(-ratio)
    },
    "k3 lacks its last term": {"k3": lambda ratio: torch.exp(-ratio) - 1},
    "the sign of k3 is turned": {"k3": lambda ratio: -_k3(ratio)},
}


@check(_estimates, ESTIMATES)
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
