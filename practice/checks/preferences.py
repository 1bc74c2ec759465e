"""Checks of the losses on pairs."""

import torch

from practice.checks.comparison import check


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
    "the difference itself is the loss, without a sigmoid": {"each": lambda x: x},
    "a tie counts as a win": {"wins": torch.ge},
}


def _loss_and_slopes(function, leaves, *rest):
    """Loss, gradient with respect to every number of the (B,) leaves, and stats."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss, stats = function(*leaves, *rest)
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(slopes, leaves, strict=True)
    return (
        loss,
        torch.stack([torch.zeros_like(x) if s is None else s for s, x in pairs]),
        stats,
    )


@check(_bradley_terry, BRADLEY_TERRY)
def check_bradley_terry_loss(case):
    """`bradley_terry_loss(chosen_scores, rejected_scores)` -> loss, stats."""
    scores = case.normal(7), case.normal(7)
    scores[1][3] = scores[0][3]  # a tie

    def measure(function):
        loss, gradient, stats = _loss_and_slopes(function, scores)
        return {"loss": loss, "gradient": gradient, **stats}

    return measure


def _dpo(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    beta,
    smoothing,
    kind,
    turn=1,
    ref=1,
    price=lambda beta: beta,
    outside=lambda beta: 1,
    smooth=1,
    fixed=True,
    over=_mean,
    scale=lambda beta: 1,
    target=lambda beta: 1 / (2 * beta),
):
    """Both kinds; the rest says what a mistake changes. The statistics stay right."""
    references = [x.detach() if fixed else x for x in (ref_chosen, ref_rejected)]
    ratios = [chosen - ref_chosen, rejected - ref_rejected]
    stats = {
        "chosen_reward": beta * _mean(ratios[0]),
        "rejected_reward": beta * _mean(ratios[1]),
        "accuracy": _mean((ratios[0] > ratios[1]).double()),
    }
    D = turn * (chosen - rejected - ref * (references[0] - references[1]))
    if kind == "ipo":
        return over((scale(beta) * D - target(beta)) ** 2), stats
    D, share = price(beta) * D, smooth * smoothing
    each = (1 - share) * _log_sigmoid(D) + share * _log_sigmoid(-D)
    return -outside(beta) * over(each), stats


DPO = {
    "chosen and rejected are swapped": {"turn": -1},
    "the reference is left out": {"ref": 0},
    "the reference has the wrong sign": {"ref": -1},
    "beta stands outside of the sigmoid": {
        "price": lambda beta: 1,
        "outside": lambda beta: beta,
    },
    "beta is left out": {"price": lambda beta: 1},
    "the labels are not smoothed": {"smooth": 0},
    "gradients reach the reference": {"fixed": False},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "IPO's difference is multiplied by beta": {"scale": lambda beta: beta},
    "IPO's target is 1 / beta, not half of it": {"target": lambda beta: 1 / beta},
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
            found = _loss_and_slopes(function, texts, beta, share, kind)
            got |= {f"loss of {kind}": found[0], f"gradient of {kind}": found[1]}
            got |= found[2]
        return got

    return measure
