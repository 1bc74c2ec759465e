"""Checks of the two losses, of their gradients and of their statistics."""

import torch

from practice.checks.comparison import check
from practice.checks.rewards import k3


def _mean(x, mask):
    return x[mask.bool()].mean()


def _by_response(x, mask):
    return ((x * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def _near(ratio, clip):
    return ratio.clamp(1 - clip, 1 + clip)


def _policy_loss(
    new, old, A, mask, clip, pick=torch.maximum, sign=1, turn=1, kl=k3, near=_near,
    mean=_mean,
):  # fmt: skip
    """PPO's loss; the rest says what a mistake changes. The statistics stay right."""
    ratio = torch.exp(turn * (new - old))
    plain, clipped = (-sign * A * x for x in (ratio, near(ratio, clip)))
    rho, A = torch.exp(new - old)[mask.bool()], A[mask.bool()]
    return mean(pick(plain, clipped), mask), {
        "approx_kl": kl(-rho.log()).mean(),
        "clip_fraction": (A * _near(rho, clip) < A * rho).double().mean(),
        "ratio_mean": rho.mean(),
        "ratio_max": rho.max(),
    }


def _value_loss(
    values, old, returns, mask, clip, pick=torch.maximum, at=None, half=0.5, mean=_mean
):
    """The loss of the value head; `at` is what a mistake clips the values around."""

    def errors(centre):
        near = torch.clamp(values, centre - clip, centre + clip)
        return (values - returns) ** 2, (near - returns) ** 2

    plain, clipped = errors(old)
    bound = _mean((clipped > plain).double(), mask)
    loss = half * mean(pick(*errors(at(old, returns) if at else old)), mask)
    return loss, {"value_clip_fraction": bound}


def _first(plain, clipped):
    return plain


def _second(plain, clipped):
    return clipped


OF_BOTH = {
    "there is no mask: padding counts like a token": {"mean": lambda x, mask: x.mean()},
    "the sum is divided by the number of all slots, not of the real tokens": {
        "mean": lambda x, mask: (x * mask).mean()
    },
    "each response weighs the same; in PPO each token does": {"mean": _by_response},
    "the loss has no gradient (detached, or made under no_grad?)": {
        "mean": lambda x, mask: _mean(x, mask).detach()
    },
}
POLICY_LOSS = {
    "min stands for max (a loss takes the larger)": {"pick": torch.minimum},
    "the sign is turned: worse tokens become likelier": {"sign": -1},
    "the sign is turned, and min stands for max": {"sign": -1, "pick": torch.minimum},
    "the ratio is not clipped": {"pick": _first},
    "only the clipped branch is there": {"pick": _second},
    "log rho is clipped, not rho": {
        "near": lambda ratio, clip: ratio.log().clamp(-clip, clip).exp()
    },
    "the ratio is turned around: rho = pi_theta / pi_old": {"turn": -1},
    **OF_BOTH,
    "approx_kl is turned around; pi_old sampled": {"kl": lambda x: k3(-x)},
}
VALUE_LOSS = {
    "nothing is clipped (around the return nothing ever is; clip around the old "
    "value)": [{"pick": _first}, {"at": _second}],
    "the value is clipped around 0, not around the old value": {
        "at": lambda old, returns: 0 * old
    },
    "min stands for max of the two errors": {"pick": torch.minimum},
    "only the clipped error is there": {"pick": _second},
    "the factor 1/2 is left out": {"half": 1.0},
    **OF_BOTH,
}


@check(_policy_loss, POLICY_LOSS, "loss", "gradient", "stats", leaves=1)
def check_policy_loss(case):
    """`policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)`.

    Loss, gradient with respect to `logprobs`, and the statistics.
    """
    clip = case.uniform(0.1, 0.3)
    old, step, advantages = -1 - case.normal().abs(), 0.3 * case.normal(), case.normal()
    # In the longest response: far up and far down, of praised and blamed tokens
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.5, 0.5, -0.7, -0.7])
    advantages[1, :4] = case.uniform(0.5, 1.5) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return old + step, old, advantages, case.mask, clip


@check(_value_loss, VALUE_LOSS, "loss", "gradient", "stats", leaves=1)
def check_value_loss(case):
    """`value_loss(values, old_values, returns, mask, clip_range)`.

    Loss, gradient with respect to `values`, and the share of clipped tokens.
    """
    clip = case.uniform(0.1, 0.3)
    old, step, returns = case.normal(), 0.3 * case.normal(), case.normal()
    # In the longest response: moved far, towards the return and past it
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.6, -0.6, 0.6, -0.6])
    returns[1, :4] = old[1, :4] + torch.tensor([2.0, -2.0, -1.0, 1.0])
    return old + step, old, returns, case.mask, clip
