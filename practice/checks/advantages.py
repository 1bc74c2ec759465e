"""Checks of the whitening and of the advantages."""

import torch

from practice.checks.comparison import check


def _left(x):
    """x (B, T) with every slot's number one slot earlier, 0 in the last."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))


def _whiten(x, mask, of=1, to=0, power=0.5, lost=0, seen=torch.clone, kept=torch.clone):
    """x less its mean, by its variance (over n - lost) ** power; 0 outside the mask."""
    real = x[seen(mask).bool()]
    mean = real.sum() / len(real)
    variance = ((real - mean) ** 2).sum() / (len(real) - lost)
    return ((x - of * mean) / variance**power + to * mean) * kept(mask)


ALL = torch.ones_like
WHITENING = {
    "the mean is added back": {"to": 1},
    "padding is counted in the mean and variance": {"seen": ALL},
    "padding is counted, and whitened too": {"seen": ALL, "kept": ALL},
    "the variance is divided by n - 1, not n": {"lost": 1},
    "the mean is not taken away": {"of": 0},
    "the variance is not made 1": {"power": 0},
    "the divisor is the variance, not its root": {"power": 1},
}


@check(_whiten, WHITENING, "result")
def check_whiten(case):
    """`masked_whiten(x, mask)`: mean 0 and population variance 1 over the mask."""
    return 3 + 2 * case.normal(), case.mask


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


def _whitened(rewards, values, mask, *rest):
    """The advantages before and after they are whitened, and the returns of each."""
    raw, returns = _gae(rewards, values, mask, *rest)
    white = _whiten(raw, mask)
    return raw, white, returns, white + values * mask


def _late(rewards, values, mask, *rest):
    late = _left(values * mask)
    advantages, returns = _gae(rewards, late, mask, *rest)
    return advantages, returns, advantages + values * mask


def _into_the_padding(rewards, values, mask, *rest):
    found = _gae(rewards, values, torch.ones_like(mask), *rest)
    return tuple(x * mask for x in found)


def _from_the_front(rewards, values, mask, *rest):
    flipped = (x.flip(1) for x in (rewards, values, mask))
    return tuple(x.flip(1) for x in _gae(*flipped, *rest))


ADVANTAGES = {
    "the advantages are whitened first, before the returns are formed": [
        lambda *given: _whitened(*given)[1::2],
        lambda *given: _whitened(*given)[0::3],
    ],
    "the advantages come out whitened": lambda *given: _whitened(*given)[1:3],
    "the values are read one slot late": [
        lambda *given: _late(*given)[:2],
        lambda *given: _late(*given)[0::2],
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
    "the returns lack the values: G = A + V": lambda *given: (_gae(*given)[0],) * 2,
}


@check(_gae, ADVANTAGES, "advantages", "returns")
def check_gae(case):
    """`compute_gae(rewards, values, mask, gamma, lam)` -> advantages, returns."""
    gamma, lam = case.uniform(0.7, 0.95), case.uniform(0.3, 0.9)
    return case.normal(), case.normal(), case.mask, gamma, lam
