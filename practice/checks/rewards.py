"""Checks of the reward of each token and of the KL estimators."""

import torch

from practice.checks.comparison import check


def k3(log_ratio):
    """The estimate of the KL whose samples are never negative."""
    return torch.exp(-log_ratio) - 1 + log_ratio


def _rewards(
    scores, logprobs, ref, mask, beta, kl=torch.clone, paying=torch.clone,
    place=lambda n, width: n - 1,
):  # fmt: skip
    """Each token pays for its KL; the score at `place(n, T)` of n tokens."""
    rewards = -beta * kl(logprobs - ref) * paying(mask)
    for row, score, n in zip(rewards, scores, mask.sum(dim=1).tolist(), strict=True):
        row[place(n, len(row))] += score
    return rewards


REWARDS = {
    "the sign of the KL is turned": {"kl": torch.neg},
    "the score stands on the slot after EOS": [
        {"place": lambda n, width: slice(n, n + 1)},  # lost, if there is none
        {"place": lambda n, width: min(n, width - 1)},
    ],
    "the score stands on the last slot, padding or not": {"place": lambda *_: -1},
    "the score stands on the first token": {"place": lambda *_: 0},
    "every token gets the score": {"place": lambda n, width: slice(n)},
    "the score is left out": {"place": lambda *_: slice(0)},
    "the KL coefficient is left out": {"beta": 1},
    "the KL penalty is left out": {"beta": 0},
    "padding pays for its KL, too": {"paying": torch.ones_like},
    "k3 stands for k1; only k1 adds up to the response's log-ratio": {"kl": k3},
}


@check(_rewards, REWARDS, "rewards")
def check_token_rewards(case):
    """`token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)` -> (B, T)."""
    logprobs, ref = -case.normal().abs(), -case.normal().abs()
    scores, beta = case.normal(len(case.mask)), case.uniform(0.1, 0.5)
    return scores, logprobs, ref, case.mask, beta


def _estimates(new, ref, kind, k1=torch.clone, k2=lambda x: x**2 / 2, k3=k3):
    return {"k1": k1, "k2": k2, "k3": k3}[kind](new - ref)


ESTIMATES = {
    "the sign of k1 is turned": {"k1": torch.neg},
    "k1 is made positive; only its mean is": {"k1": abs},
    "the factor 1/2 of k2 is left out": {"k2": torch.square},
    "k3 takes the log-ratio reversed; its mean is then not KL(pi || pi_ref)": {
        "k3": lambda x: k3(-x)
    },
    "k3 lacks its last term": {"k3": lambda x: k3(x) - x},
    "the sign of k3 is turned": {"k3": lambda x: -k3(x)},
}


@check(_estimates, ESTIMATES, "")
def check_kl_estimate(case):
    """`kl_estimate(logprobs, ref_logprobs, kind)` for k1, k2 and k3."""
    p, q = (case.normal(3, 5).log_softmax(dim=-1) for _ in range(2))
    return {kind: (p, q, kind) for kind in ("k1", "k2", "k3")}
