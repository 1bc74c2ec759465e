"""Checks of the losses on pairs."""

import torch

from practice.checks.comparison import check, loss_and_gradient


def _log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def _mean(x):
    return x.sum() / len(x)


def _bradley_terry(
    chosen, rejected, turn=1, each=_log_sigmoid, over=_mean, wins=torch.gt
):
    stats = {
        "accuracy": _mean(wins(chosen, rejected).double()),
        "margin": _mean(chosen - rejected),
    }
    return -over(each(turn * (chosen - rejected))), stats


BRADLEY_TERRY = {
    "chosen and rejected are swapped": {"turn": -1},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "the sigmoid has no logarithm": {"each": torch.sigmoid},
    "the difference itself is the loss, without a sigmoid": {"each": torch.clone},
    "a tie counts as a win": {"wins": torch.ge},
}


@check(_bradley_terry, BRADLEY_TERRY, leaves=2)
def check_bradley_terry_loss(case):
    """`bradley_terry_loss(chosen_scores, rejected_scores)` -> loss, stats."""
    chosen, rejected = case.normal(7), case.normal(7)
    rejected[3] = chosen[3]  # a tie
    return chosen, rejected


def _dpo(
    *logprobs, turn=1, ref=1, inside=1, outside=0, smooth=1, fixed=True, over=_mean,
    ipo=0, target=2,
):  # fmt: skip
    """Both kinds; the rest says what a mistake changes. The statistics stay right.

    `inside`, `outside`, `ipo`: the power of beta in the sigmoid, before it, and as a
    factor of IPO's difference.
    """
    *logprobs, beta, smoothing, kind = logprobs
    chosen, rejected, *references = logprobs
    ratios = [chosen - references[0], rejected - references[1]]
    stats = {
        "chosen_reward": beta * _mean(ratios[0]),
        "rejected_reward": beta * _mean(ratios[1]),
        "accuracy": _mean((ratios[0] > ratios[1]).double()),
    }
    first, second = (x.detach() if fixed else x for x in references)
    D = turn * (chosen - rejected - ref * (first - second))
    if kind == "ipo":
        return over((beta**ipo * D - 1 / (target * beta)) ** 2), stats
    D, share = beta**inside * D, smooth * smoothing
    each = (1 - share) * _log_sigmoid(D) + share * _log_sigmoid(-D)
    return -(beta**outside) * over(each), stats


DPO = {
    "chosen and rejected are swapped": {"turn": -1},
    "the reference is left out": {"ref": 0},
    "the reference has the wrong sign": {"ref": -1},
    "beta stands outside of the sigmoid": {"inside": 0, "outside": 1},
    "beta is left out": {"inside": 0},
    "the labels are not smoothed": {"smooth": 0},
    "gradients reach the reference": {"fixed": False},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "IPO's difference is multiplied by beta": {"ipo": 1},
    "IPO's target is 1 / beta, not half of it": {"target": 1},
}


@check(_dpo, DPO)
def check_dpo_loss(case):
    """`dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, kind)`.

    Loss and gradient of both kinds; the reference gets none.
    """
    beta, smoothing = case.uniform(0.2, 0.6), case.uniform(0.1, 0.3)
    texts = [-5 + case.normal(6) for _ in range(4)]
    texts[2:] = [x + 0.5 * case.normal(6) for x in texts[:2]]

    def measure(function):
        got = {}
        for kind, share in (("sigmoid", smoothing), ("ipo", 0.0)):
            found = loss_and_gradient((*texts, beta, share, kind), 4, function)
            got |= {f"{k} of {kind}": found.pop(k) for k in ("loss", "gradient")}
            got |= found
        return got

    return measure
