"""Checks of the whitening and of the advantages."""

import torch

from practice.checks.comparison import check

ALL = torch.ones_like


def _whiten(x, mask, of=1, to=0, power=0.5, lost=0, seen=torch.clone, kept=torch.clone):
    """x less its mean, by its variance (over n - lost) ** power; 0 outside the mask."""
    real = x[seen(mask).bool()]
    mean = real.sum() / len(real)
    variance = ((real - mean) ** 2).sum() / (len(real) - lost)
    return ((x - of * mean) / variance**power + to * mean) * kept(mask)


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


def _left(x):
    """x (B, T) with every slot's number one slot earlier, 0 in the last."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))


def _gae(
    rewards, values, mask, gamma, lam, real=torch.clone, inside=torch.clone,
    read=torch.clone, added=torch.clone, out=torch.mul, summed=torch.mul,
):  # fmt: skip
    """A_t as the explicit sum of the TD errors that follow (GAE, equation 16).

    What a mistake changes: where values and TD errors are `real` and `inside`, how
    values are `read` and `added`, and what goes `out`, and is `summed` to the returns.
    """
    values = values * real(mask)
    seen = read(values)
    delta = (rewards + gamma * _left(seen) - seen) * inside(mask)
    places = torch.arange(mask.shape[1], dtype=delta.dtype)
    weights = ((gamma * lam) ** (places - places[:, None]).clamp(min=0)).triu()
    advantages = delta @ weights.t()
    return out(advantages, mask), summed(advantages, mask) + added(values) * mask


def _from_the_front(rewards, values, mask, *rest):
    flipped = (x.flip(1) for x in (rewards, values, mask))
    return tuple(x.flip(1) for x in _gae(*flipped, *rest))


ADVANTAGES = {
    "the advantages are whitened first, before the returns are formed": [
        {"out": _whiten, "summed": _whiten},
        {"summed": _whiten},
    ],
    "the advantages come out whitened": {"out": _whiten},
    "the values are read one slot late": [
        {"read": _left, "added": _left},
        {"read": _left},
    ],
    "the sum runs on into the padding": {"real": ALL, "inside": ALL},
    "the slot behind EOS has a value; nothing more is to come, so it is 0": {
        "real": ALL
    },
    "lambda is left out": {"lam": 1.0},
    "gamma is left out": {"gamma": 1.0},
    "only the TD error of the token itself counts": {"lam": 0.0},
    "the sum runs from first token to last": _from_the_front,
    "the returns lack the values: G = A + V": {"added": torch.zeros_like},
}


@check(_gae, ADVANTAGES, "advantages", "returns")
def check_gae(case):
    """`compute_gae(rewards, values, mask, gamma, lam)` -> advantages, returns."""
    gamma, lam = case.uniform(0.7, 0.95), case.uniform(0.3, 0.9)
    return case.normal(), case.normal(), case.mask, gamma, lam
