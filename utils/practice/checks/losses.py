"""Checks of the two losses, of their gradients and of their statistics."""

import math

import torch

from utils.practice.checks.case import Case, mean_of
from utils.practice.checks.comparison import Result, compare, name_of


def _loss(case, rows, token_loss, mean_over="tokens"):
    """A loss that is a mean over tokens, and its gradient by finite differences.

    `token_loss` takes the numbers of one token; the gradient is with respect to the
    first of them.
    """
    h, total, slopes = 1e-5, 0.0, []
    for row, n in zip(rows, case.lengths, strict=True):
        count = {"tokens": case.n_tokens, "slots": case.mask.numel()}
        weight = 1 / count.get(mean_over, n * len(rows))
        tokens = list(zip(*row, strict=True))
        total += sum(weight * token_loss(*token) for token in tokens)
        rises = [token_loss(x + h, *y) - token_loss(x - h, *y) for x, *y in tokens]
        slopes.append([weight * rise / (2 * h) for rise in rises])
    return {"loss": total, "gradient": case.table(slopes)}


def _loss_mistakes(case, tensors, token_loss):
    """What can go wrong around any loss that is a mean over tokens."""
    rows = case.rows(*tensors)
    with_padding = list(zip(*(x.tolist() for x in tensors), strict=True))
    return [
        (
            "there is no mask: padding counts like a token",
            _loss(case, with_padding, token_loss, "slots"),
        ),
        (
            "the sum is divided by the number of all slots, not of the real tokens",
            _loss(case, rows, token_loss, "slots"),
        ),
        (
            "each response weighs the same; in PPO each token does",
            _loss(case, rows, token_loss, "rows"),
        ),
        (
            "the loss has no gradient (detached, or made under no_grad?)",
            {"gradient": torch.zeros(case.mask.shape)},
        ),
    ]


def _call_loss(function, x, *others):
    """Loss, gradient with respect to x, and statistics of a loss function."""
    x = x.clone().requires_grad_()
    result = function(x, *others)
    loss, stats = result if isinstance(result, tuple) else (result, {})
    gradient = torch.zeros_like(x)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, x)
    return {"loss": loss, "gradient": gradient, **stats}


def check_policy_loss(function, seed: int = 0) -> Result:
    """`policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)`.

    Loss, gradient with respect to `logprobs`, and the statistics.
    """
    case = Case(seed)
    clip = case.uniform(0.1, 0.3)
    old, step, advantages = -1 - case.normal().abs(), 0.3 * case.normal(), case.normal()
    # In the longest response: far up and far down, of praised and blamed tokens
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.5, 0.5, -0.7, -0.7])
    advantages[1, :4] = case.uniform(0.5, 1.5) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    rows = case.rows(old + step, old, advantages)

    def near(ratio):
        return min(max(ratio, 1 - clip), 1 + clip)

    def surrogate(pick=max, sign=1, turn=1, clipped=near):
        def token_loss(new, old, A):
            ratio = math.exp(turn * (new - old))
            return pick(-sign * A * ratio, -sign * A * clipped(ratio))

        return token_loss

    def clipped_in_logs(ratio):
        return math.exp(min(max(math.log(ratio), -clip), clip))

    def mistake(sentence, **changes):
        return sentence, _loss(case, rows, surrogate(**changes))

    tokens = [token for row in rows for token in zip(*row, strict=True)]
    ratios = [math.exp(new - old) for new, old, _ in tokens]
    gains = [A for *_, A in tokens]
    expected = {
        **_loss(case, rows, surrogate()),
        "approx_kl": mean_of([r - 1 - math.log(r) for r in ratios]),
        "clip_fraction": mean_of(
            [-A * near(r) > -A * r for A, r in zip(gains, ratios, strict=True)]
        ),
        "ratio_mean": mean_of(ratios),
        "ratio_max": max(ratios),
    }
    turned_kl = mean_of([1 / r - 1 + math.log(r) for r in ratios])
    mistakes = [
        mistake("min stands for max (a loss takes the larger)", pick=min),
        mistake("the sign is turned: worse tokens become likelier", sign=-1),
        mistake("the sign is turned, and min stands for max", sign=-1, pick=min),
        mistake("the ratio is not clipped", clipped=lambda ratio: ratio),
        mistake(
            "only the clipped branch is there", pick=lambda plain, clipped: clipped
        ),
        mistake("log rho is clipped, not rho", clipped=clipped_in_logs),
        mistake("the ratio is turned around: rho = pi_theta / pi_old", turn=-1),
        *_loss_mistakes(case, (old + step, old, advantages), surrogate()),
        ("approx_kl is turned around; pi_old sampled", {"approx_kl": turned_kl}),
    ]
    return compare(
        name_of(function),
        lambda: _call_loss(function, old + step, old, advantages, case.mask, clip),
        expected,
        mistakes,
    )


def check_value_loss(function, seed: int = 0) -> Result:
    """`value_loss(values, old_values, returns, mask, clip_range)`.

    Loss, gradient with respect to `values`, and the share of clipped tokens.
    """
    case = Case(seed)
    clip = case.uniform(0.1, 0.3)
    old, step, returns = case.normal(), 0.3 * case.normal(), case.normal()
    # In the longest response: moved far, towards the return and past it
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.6, -0.6, 0.6, -0.6])
    returns[1, :4] = old[1, :4] + torch.tensor([2.0, -2.0, -1.0, 1.0])
    rows = case.rows(old + step, old, returns)

    def near(x, centre):
        return min(max(x, centre - clip), centre + clip)

    def squared(pick=max, centre=lambda old: old, half=0.5):
        def token_loss(V, old, G):
            return half * pick((V - G) ** 2, (near(V, centre(old)) - G) ** 2)

        return token_loss

    def mistake(sentence, **changes):
        return sentence, _loss(case, rows, squared(**changes))

    tokens = [token for row in rows for token in zip(*row, strict=True)]
    bound = [(near(V, old) - G) ** 2 > (V - G) ** 2 for V, old, G in tokens]
    mistakes = [
        mistake(
            "nothing is clipped (around the return nothing ever is; clip around the "
            "old value)",
            pick=lambda plain, clipped: plain,
        ),
        mistake(
            "the value is clipped around 0, not around the old value",
            centre=lambda old: 0.0,
        ),
        mistake("min stands for max of the two errors", pick=min),
        mistake("only the clipped error is there", pick=lambda plain, clipped: clipped),
        mistake("the factor 1/2 is left out", half=1.0),
        *_loss_mistakes(case, (old + step, old, returns), squared()),
    ]
    return compare(
        name_of(function),
        lambda: _call_loss(function, old + step, old, returns, case.mask, clip),
        {**_loss(case, rows, squared()), "value_clip_fraction": mean_of(bound)},
        mistakes,
    )
