"""Checks of the whitening and of the advantages."""

import torch

from utils.practice.checks.case import Case, mean_of
from utils.practice.checks.comparison import Result, compare, name_of


def _whiten(rows, centre=True, power=0.5, lost=0):
    """Rows of numbers less their mean, by their variance (over n - lost) ** power."""
    numbers = [x for row in rows for x in row]
    mean = mean_of(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - lost)
    return [[(x - centre * mean) / variance**power for x in row] for row in rows]


def check_whiten(function, seed: int = 0) -> Result:
    """`masked_whiten(x, mask)`: mean 0 and population variance 1 over the mask."""
    case = Case(seed)
    x = 3 + 2 * case.normal()
    rows = [row for (row,) in case.rows(x)]
    mean = mean_of([number for row in rows for number in row])
    over_slots = torch.tensor(_whiten(x.tolist()), dtype=torch.float64)
    white = case.table(_whiten(rows))
    mistakes = [
        ("the mean is added back", white + mean * case.mask),
        ("padding is counted in the mean and variance", over_slots * case.mask),
        ("padding is counted, and whitened too", over_slots),
        ("the variance is divided by n - 1, not n", case.table(_whiten(rows, lost=1))),
        ("the mean is not taken away", case.table(_whiten(rows, centre=False))),
        ("the variance is not made 1", case.table(_whiten(rows, power=0))),
        (
            "the divisor is the variance, not its root",
            case.table(_whiten(rows, power=1)),
        ),
    ]
    return compare(
        name_of(function),
        lambda: {"result": function(x.clone(), case.mask.clone())},
        {"result": white},
        [(sentence, {"result": value}) for sentence, value in mistakes],
    )


def _added(rows, others):
    return [
        [a + b for a, b in zip(*pair, strict=True)]
        for pair in zip(rows, others, strict=True)
    ]


def _gae(rewards, values, gamma, lam, after=0.0):
    """A_t as the explicit sum of the TD errors that follow (GAE, equation 16)."""
    n, V = len(rewards), [*values, after]
    delta = [rewards[t] + gamma * V[t + 1] - V[t] for t in range(n)]
    weights = [(gamma * lam) ** k for k in range(n)]
    return [sum(weights[k] * delta[t + k] for k in range(n - t)) for t in range(n)]


def check_gae(function, seed: int = 0) -> Result:
    """`compute_gae(rewards, values, mask, gamma, lam)` -> advantages, returns."""
    case = Case(seed)
    rewards, values = case.normal(), case.normal()
    gamma, lam = case.uniform(0.7, 0.95), case.uniform(0.3, 0.9)
    pairs = case.rows(rewards, values)
    V = [row for _, row in pairs]
    late_V = [[*row[1:], 0.0] for row in V]
    all_slots = zip(rewards.tolist(), values.tolist(), case.lengths, strict=True)
    behind = [[*row, 0.0][n] for row, n in zip(values, case.lengths, strict=True)]

    def answer(advantages, returns):
        return {"advantages": case.table(advantages), "returns": case.table(returns)}

    def variant(gamma=gamma, lam=lam):
        A = [_gae(r, v, gamma, lam) for r, v in pairs]
        return answer(A, _added(A, V))

    right = [_gae(r, v, gamma, lam) for r, v in pairs]
    white = _whiten(right)
    late = [_gae(r, v, gamma, lam) for (r, _), v in zip(pairs, late_V, strict=True)]
    forward = [_gae(r[::-1], v[::-1], gamma, lam)[::-1] for r, v in pairs]
    padded = [_gae(r, v, gamma, lam)[:n] for r, v, n in all_slots]
    bootstrapped = [
        _gae(r, v, gamma, lam, after)
        for (r, v), after in zip(pairs, behind, strict=True)
    ]
    whitened_first = "the advantages are whitened first, before the returns are formed"
    late_values = "the values are read one slot late"
    mistakes = [
        (whitened_first, answer(white, _added(white, V))),
        (whitened_first, answer(right, _added(white, V))),
        ("the advantages come out whitened", answer(white, _added(right, V))),
        (late_values, answer(late, _added(late, V))),
        (late_values, answer(late, _added(late, late_V))),
        ("the sum runs on into the padding", answer(padded, _added(padded, V))),
        (
            "the slot behind EOS has a value; nothing more is to come, so it is 0",
            answer(bootstrapped, _added(bootstrapped, V)),
        ),
        ("lambda is left out", variant(lam=1.0)),
        ("gamma is left out", variant(gamma=1.0)),
        ("only the TD error of the token itself counts", variant(lam=0.0)),
        ("the sum runs from first token to last", answer(forward, _added(forward, V))),
        ("the returns lack the values: G = A + V", answer(right, right)),
    ]

    def call():
        tensors = (rewards.clone(), values.clone(), case.mask.clone())
        advantages, returns = function(*tensors, gamma, lam)
        return {"advantages": advantages, "returns": returns}

    return compare(name_of(function), call, answer(right, _added(right, V)), mistakes)
