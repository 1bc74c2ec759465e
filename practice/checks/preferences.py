"""Checks of the losses on pairs."""

import torch

from practice.checks.comparison import check


def _log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def _bradley_terry(
    chosen, rejected, turn=1, each=_log_sigmoid, over=torch.mean, wins=torch.gt
):
    loss = -over(each(turn * (chosen - rejected)))
    accuracy = wins(chosen, rejected).double().mean()
    return loss, {"accuracy": accuracy, "margin": (chosen - rejected).mean()}


BRADLEY_TERRY = {
    "chosen and rejected are swapped": {"turn": -1},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "the sigmoid has no logarithm": {"each": torch.sigmoid},
    "the difference itself is the loss, without a sigmoid": {"each": torch.clone},
    "a tie counts as a win": {"wins": torch.ge},
}


@check(_bradley_terry, BRADLEY_TERRY, "loss", "gradient", "stats", leaves=2)
def check_bradley_terry_loss(case):
    """`bradley_terry_loss(chosen_scores, rejected_scores)` -> loss, stats."""
    chosen, rejected = case.normal(7), case.normal(7)
    rejected[3] = chosen[3]  # a tie
    return chosen, rejected


def _dpo(
    chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, kind, turn=1, ref=1,
    inside=1, outside=0, fixed=torch.detach, over=torch.mean, ipo=0, target=2,
):  # fmt: skip
    """Both kinds; the rest says what a mistake changes. The statistics stay right.

    `inside`, `outside`, `ipo`: the power of beta in the sigmoid, before it, and as a
    factor of IPO's difference.
    """
    ratios = [chosen - ref_chosen, rejected - ref_rejected]
    stats = {
        "chosen_reward": beta * ratios[0].mean(),
        "rejected_reward": beta * ratios[1].mean(),
        "accuracy": (ratios[0] > ratios[1]).double().mean(),
    }
    D = turn * (chosen - rejected - ref * fixed(ref_chosen - ref_rejected))
    if kind == "ipo":
        return over((beta**ipo * D - 1 / (target * beta)) ** 2), stats
    D = beta**inside * D
    each = (1 - smoothing) * _log_sigmoid(D) + smoothing * _log_sigmoid(-D)
    return -(beta**outside) * over(each), stats


DPO = {
    "chosen and rejected are swapped": {"turn": -1},
    "the reference is left out": {"ref": 0},
    "the reference has the wrong sign": {"ref": -1},
    "beta stands outside of the sigmoid": {"inside": 0, "outside": 1},
    "beta is left out": {"inside": 0},
    "the labels are not smoothed": {"smoothing": 0},
    "gradients reach the reference": {"fixed": torch.clone},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "IPO's difference is multiplied by beta": {"ipo": 1},
    "IPO's target is 1 / beta, not half of it": {"target": 1},
}


@check(_dpo, DPO, "loss", "gradient", "stats", leaves=4)
def check_dpo_loss(case):
    """`dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, kind)`.

    Loss and gradient of both kinds; the reference gets none.
    """
    beta, smoothing = case.uniform(0.2, 0.6), case.uniform(0.1, 0.3)
    texts = [-5 + case.normal(6) for _ in range(4)]
    texts[2:] = [x + 0.5 * case.normal(6) for x in texts[:2]]
    shares = {"sigmoid": smoothing, "ipo": 0.0}
    return {f" of {kind}": (*texts, beta, x, kind) for kind, x in shares.items()}
