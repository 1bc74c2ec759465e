"""Checks of the two losses, of their gradients and of their statistics."""

import torch

from practice.checks.comparison import check


def _over_tokens(x, mask):
    return x[mask.bool()].mean()


def _policy_loss(
    new,
    old,
    advantages,
    mask,
    clip,
    pick=torch.maximum,
    sign=1,
    turn=1,
    near=lambda ratio, clip: ratio.clamp(1 - clip, 1 + clip),
    mean=_over_tokens,
):
    """PPO's loss; the rest says what a mistake changes. The statistics stay right."""
    ratio = torch.exp(turn * (new - old))
    plain, clipped = (-sign * advantages * x for x in (ratio, near(ratio, clip)))
    rho, A = torch.exp(new - old)[mask.bool()], advantages[mask.bool()]
    stats = {
        "approx_kl": (rho - 1 - rho.log()).mean(),
        "clip_fraction": (A * rho.clamp(1 - clip, 1 + clip) < A * rho).double().mean(),
        "ratio_mean": rho.mean(),
        "ratio_max": rho.max(),
    }
    return mean(pick(plain, clipped), mask), stats


def _value_loss(
    values,
    old,
    returns,
    mask,
    clip,
    pick=torch.maximum,
    centre=lambda old, returns: old,
    half=0.5,
    mean=_over_tokens,
):
    """The loss of the value head; the rest says what a mistake changes."""

    def errors(centre):
        near = torch.clamp(values, centre - clip, centre + clip)
        return (values - returns) ** 2, (near - returns) ** 2

    plain, clipped = errors(old)
    bound = (clipped > plain)[mask.bool()].double().mean()
    loss = half * mean(pick(*errors(centre(old, returns))), mask)
    return loss, {"value_clip_fraction": bound}


def _mistakes_of_both(loss):
    """Mistakes around a loss that is a mean over tokens."""

    def by_response(x, mask):
        rows = zip(x, mask, strict=True)
        return torch.stack([_over_tokens(*row) for row in rows]).mean()

    def without_gradient(*arguments):
        value, stats = loss(*arguments)
        return value.detach(), stats

    return {
        "there is no mask: padding counts like a token": {
            "mean": lambda x, mask: x.mean()
        },
        "the sum is divided by the number of all slots, not of the real tokens": {
            "mean": lambda x, mask: (x * mask).sum() / mask.numel()
        },
        "each response weighs the same; in PPO each token does": {"mean": by_response},
        "the loss has no gradient (detached, or made under no_grad?)": (
            without_gradient
        ),
    }


def _turned_kl(new, old, advantages, mask, clip):
    loss, stats = _policy_loss(new, old, advantages, mask, clip)
    ratio = torch.exp(old - new)[mask.bool()]
    return loss, {**stats, "approx_kl": (ratio - 1 - ratio.log()).mean()}


def _clipped_log(ratio, clip):
    return ratio.log().clamp(-clip, clip).exp()


def _first(plain, clipped):
    return plain


def _second(plain, clipped):
    return clipped


POLICY_LOSS = {
    "min stands for max (a loss takes the larger)": {"pick": torch.minimum},
    "the sign is turned: worse tokens become likelier": {"sign": -1},
    "the sign is turned, and min stands for max": {"sign": -1, "pick": torch.minimum},
    "the ratio is not clipped": {"pick": _first},
    "only the clipped branch is there": {"pick": _second},
    "log rho is clipped, not rho": {"near": _clipped_log},
    "the ratio is turned around: rho = pi_theta / pi_old": {"turn": -1},
    **_mistakes_of_both(_policy_loss),
    "approx_kl is turned around; pi_old sampled": _turned_kl,
}
VALUE_LOSS = {
    "nothing is clipped (around the return nothing ever is; clip around the old "
    "value)": [{"pick": _first}, {"centre": lambda old, returns: returns}],
    "the value is clipped around 0, not around the old value": {
        "centre": lambda old, returns: 0 * old
    },
    "min stands for max of the two errors": {"pick": torch.minimum},
    "only the clipped error is there": {"pick": _second},
    "the factor 1/2 is left out": {"half": 1.0},
    **_mistakes_of_both(_value_loss),
}


def _measure(x, *others):
    """Of a loss function: its value, gradient with respect to x, and statistics."""

    def measure(function):
        leaf = x.clone().requires_grad_()
        result = function(leaf, *others)
        loss, stats = result if isinstance(result, tuple) else (result, {})
        gradient = torch.zeros_like(leaf)
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss, "gradient": gradient, **stats}

    return measure


@check(_policy_loss, POLICY_LOSS)
def check_policy_loss(case):
    """`policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)`.

    Loss, gradient with respect to `logprobs`, and the statistics.
    """
    clip = case.uniform(0.1, 0.3)
    old, step, advantages = -1 - case.normal().abs(), 0.3 * case.normal(), case.normal()
    # In the longest response: far up and far down, of praised and blamed tokens
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.5, 0.5, -0.7, -0.7])
    advantages[1, :4] = case.uniform(0.5, 1.5) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return _measure(old + step, old, advantages, case.mask, clip)


@check(_value_loss, VALUE_LOSS)
def check_value_loss(case):
    """`value_loss(values, old_values, returns, mask, clip_range)`.

    Loss, gradient with respect to `values`, and the share of clipped tokens.
    """
    clip = case.uniform(0.1, 0.3)
    old, step, returns = case.normal(), 0.3 * case.normal(), case.normal()
    # In the longest response: moved far, towards the return and past it
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.6, -0.6, 0.6, -0.6])
    returns[1, :4] = old[1, :4] + torch.tensor([2.0, -2.0, -1.0, 1.0])
    return _measure(old + step, old, returns, case.mask, clip)
