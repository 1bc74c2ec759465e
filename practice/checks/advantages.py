"""Checks of the whitening and of the advantages."""

from functools import partial

import torch

from practice.checks.comparison import check


def _left(x):
    """x (B, T) with every slot's number one slot earlier, 0 in the last."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))


def _whiten(x, mask, centre=True, power=0.5, lost=0):
    """x less its mean, by its variance (over n - lost) ** power; 0 outside the mask."""
    real = x[mask.bool()]
    mean = real.sum() / len(real)
    variance = ((real - mean) ** 2).sum() / (len(real) - lost)
    return (x - centre * mean) / variance**power * mask


def _mean_added_back(x, mask):
    return _whiten(x, mask) + x[mask.bool()].mean() * mask


WHITENING = {
    "the mean is added back": _mean_added_back,
    "padding is counted in the mean and variance": (
        lambda x, mask: _whiten(x, torch.ones_like(mask)) * mask
    ),
    "padding is counted, and whitened too": (
        lambda x, mask: _whiten(x, torch.ones_like(mask))
    ),
    "the variance is divided by n - 1, not n": {"lost": 1},
    "the mean is not taken away": {"centre": False},
    "the variance is not made 1": {"power": 0},
    "the divisor is the variance, not its root": {"power": 1},
}


@check(_whiten, WHITENING)
def check_whiten(case):
    """`masked_whiten(x, mask)`: mean 0 and population variance 1 over the mask."""
    x = 3 + 2 * case.normal()
    return lambda function: {"result": function(x.clone(), case.mask.clone())}


def _gae(rewards, values, mask, gamma, lam, behind=False):
    """A_t as the explicit sum of the TD errors that follow (GAE, equation 16).

    `behind`: what stands in the slot behind the last token counts as a value.
    """
    following = _left(values if behind else values * mask)
    delta = (rewards + gamma * following - values) * mask
    places = torch.arange(mask.shape[1], dtype=delta.dtype)
    distance = places - places[:, None]
    weights = (gamma * lam) ** distance.clamp(min=0) * (distance >= 0)
    advantages = (delta @ weights.t()) * mask
    return advantages, advantages + values * mask


def _whitened(rewards, values, mask, *rest, first=True, both=True):
    """Advantages that are whitened, before the returns are formed or after."""
    raw, returns = _gae(rewards, values, mask, *rest)
    white = _whiten(raw, mask)
    return white if both else raw, white + values * mask if first else returns


def _late(rewards, values, mask, *rest, only_in_the_advantages=False):
    late = _left(values * mask)
    advantages, returns = _gae(rewards, late, mask, *rest)
    return advantages, advantages + values * mask if only_in_the_advantages else returns


def _into_the_padding(rewards, values, mask, *rest):
    advantages, returns = _gae(rewards, values, torch.ones_like(mask), *rest)
    return advantages * mask, returns * mask


def _from_the_front(rewards, values, mask, *rest):
    flipped = (x.flip(1) for x in (rewards, values, mask))
    return tuple(x.flip(1) for x in _gae(*flipped, *rest))


ADVANTAGES = {
    "the advantages are whitened first, before the returns are formed": [
        _whitened,
        partial(_whitened, both=False),
    ],
    "the advantages come out whitened": partial(_whitened, first=False),
    "the values are read one slot late": [
        _late,
        partial(_late, only_in_the_advantages=True),
    ],
    "the sum runs on into the padding": _into_the_padding,
    "the slot behind EOS has a value; nothing more is to come, so it is 0": {
        "behind": True
    },
    "lambda is left out": lambda r, v, m, gamma, lam: _gae(r, v, m, gamma, 1.0),
    "gamma is left out": lambda r, v, m, gamma, lam: _gae(r, v, m, 1.0, lam),
    "only the TD error of the token itself counts": (
        lambda r, v, m, gamma, lam: _gae(r, v, m, gamma, 0.0)
    ),
    "the sum runs from first token to last": _from_the_front,
    "the returns lack the values: G = A + V": lambda *x: (_gae(*x)[0],) * 2,
}


@check(_gae, ADVANTAGES)
def check_gae(case):
    """`compute_gae(rewards, values, mask, gamma, lam)` -> advantages, returns."""
    rewards, values = case.normal(), case.normal()
    numbers = case.uniform(0.7, 0.95), case.uniform(0.3, 0.9)

    def measure(function):
        tensors = (rewards.clone(), values.clone(), case.mask.clone())
        advantages, returns = function(*tensors, *numbers)
        return {"advantages": advantages, "returns": returns}

    return measure
