"""Checks of the losses on pairs."""

import math

import torch

from utils.practice.checks.case import Case, mean_of
from utils.practice.checks.comparison import Result, compare, name_of


def _log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def _with_slopes(each, *columns, divisor=None):
    """The mean of `each(*pair)`, and its gradient with respect to every number.

    Divided by the number of pairs, or by another number.
    """
    h, pairs = 1e-5, list(zip(*columns, strict=True))
    divisor = divisor or len(pairs)

    def slope(pair, i):
        ends = [pair[:i] + (pair[i] + step,) + pair[i + 1 :] for step in (h, -h)]
        return (each(*ends[0]) - each(*ends[1])) / (2 * h) / divisor

    gradient = [[slope(pair, i) for pair in pairs] for i in range(len(columns))]
    return {"loss": sum(each(*pair) for pair in pairs) / divisor, "gradient": gradient}


def _got(function, leaves, rest=(), extra=()):
    """Loss, gradient and stats that a function gives for (B,) leaves."""
    inputs = [x.clone().requires_grad_() for x in leaves]
    value, stats = function(*inputs, *rest)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    rows = [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(inputs, gradients, strict=True)
    ]
    found = {"loss": value, "gradient": torch.stack(rows)}
    return {**found, **{name: stats[name] for name in extra}}


def check_bradley_terry_loss(function, seed: int = 0) -> Result:
    """`bradley_terry_loss(chosen_scores, rejected_scores)` -> loss, stats."""
    case = Case(seed)
    chosen, rejected = case.normal(7), case.normal(7)
    rejected[3] = chosen[3]  # a tie
    a, b = chosen.tolist(), rejected.tolist()

    def loss(turn=1, each=_log_sigmoid, divisor=None):
        return _with_slopes(lambda c, r: -each(turn * (c - r)), a, b, divisor=divisor)

    wins = [x > y for x, y in zip(a, b, strict=True)]
    expected = {
        **loss(),
        "accuracy": mean_of(wins),
        "margin": mean_of([x - y for x, y in zip(a, b, strict=True)]),
    }
    mistakes = [
        ("chosen and rejected are swapped", loss(turn=-1)),
        ("the loss is a sum over the pairs, not a mean", loss(divisor=1)),
        ("the sigmoid has no logarithm", loss(each=lambda x: 1 / (1 + math.exp(-x)))),
        ("the difference itself is the loss, without a sigmoid", loss(each=float)),
        ("a tie counts as a win", {"accuracy": mean_of([*wins, True]) * 8 / 7}),
    ]
    return compare(
        name_of(function),
        lambda: _got(function, (chosen, rejected), (), ("accuracy", "margin")),
        expected,
        mistakes,
    )


def check_dpo_loss(function, seed: int = 0) -> Result:
    """`dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, kind)`.

    Loss and gradient of both kinds; the reference gets none.
    """
    case = Case(seed)
    beta, smoothing = case.uniform(0.2, 0.6), case.uniform(0.1, 0.3)
    texts = [-5 + case.normal(6) for _ in range(4)]
    texts[2:] = [x + 0.5 * case.normal(6) for x in texts[:2]]
    chosen, rejected, *reference = [x.tolist() for x in texts]

    def sigmoid(price=beta, share=smoothing, outside=1.0, ref=1, turn=1):
        def each(c, r, q, s):
            D = turn * price * ((c - r) - ref * (q - s))
            right, wrong = _log_sigmoid(D), _log_sigmoid(-D)
            return -outside * ((1 - share) * right + share * wrong)

        return each

    def ipo(half=1 / (2 * beta), scale=1.0, ref=1, turn=1):
        return lambda c, r, q, s: (turn * scale * ((c - r) - ref * (q - s)) - half) ** 2

    def both(one=None, two=None, divisor=None, moving=False):
        found = {}
        for kind, each in (("sigmoid", one or sigmoid()), ("ipo", two or ipo())):
            columns = (chosen, rejected, *reference)
            slopes = _with_slopes(each, *columns, divisor=divisor)
            if not moving:
                slopes["gradient"][2:] = [[0.0] * 6] * 2
            found |= {f"{name} of {kind}": x for name, x in slopes.items()}
        return found

    ratios = [
        [x - y for x, y in zip(*pair, strict=True)]
        for pair in ((chosen, reference[0]), (rejected, reference[1]))
    ]
    stats = {
        "chosen_reward": beta * mean_of(ratios[0]),
        "rejected_reward": beta * mean_of(ratios[1]),
        "accuracy": mean_of([x > y for x, y in zip(*ratios, strict=True)]),
    }
    one = {"price": 1.0, "outside": beta}
    mistakes = [
        ("chosen and rejected are swapped", both(sigmoid(turn=-1), ipo(turn=-1))),
        ("the reference is left out", both(sigmoid(ref=0), ipo(ref=0))),
        ("the reference has the wrong sign", both(sigmoid(ref=-1), ipo(ref=-1))),
        ("beta stands outside of the sigmoid", both(sigmoid(**one))),
        ("beta is left out", both(sigmoid(price=1.0))),
        ("the labels are not smoothed", both(sigmoid(share=0.0))),
        ("gradients reach the reference", both(moving=True)),
        ("the loss is a sum over the pairs, not a mean", both(divisor=1)),
        ("IPO's difference is multiplied by beta", both(two=ipo(scale=beta))),
        ("IPO's target is 1 / beta, not half of it", both(two=ipo(half=1 / beta))),
    ]

    def call():
        got = {}
        for kind, share in (("sigmoid", smoothing), ("ipo", 0.0)):
            found = _got(function, texts, (beta, share, kind), stats)
            for name in ("loss", "gradient"):
                got[f"{name} of {kind}"] = found.pop(name)
            got |= found
        return got

    return compare(name_of(function), call, {**both(), **stats}, mistakes)
