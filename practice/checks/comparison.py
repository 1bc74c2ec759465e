"""What is compared with what is expected, and said about it in one line."""

import functools
import math
from dataclasses import dataclass

import torch

from practice.checks.case import Case

TOLERANCE = 1e-5  # float32's on numbers near 1; the known mistakes are far larger


@dataclass(frozen=True)
class Result:
    """The outcome of a check, true if it passed; it has been printed already."""

    passed: bool
    difference: float  # the largest; inf if there was nothing to compare with
    message: str  # what is wrong, or empty

    def __bool__(self):
        return self.passed

    def _ipython_display_(self):
        """Show nothing: as the last value of a cell it would be printed twice."""


def check(right, mistakes: dict, *names: str, leaves=0, tolerances=None):
    """A decorator: from `trial(case)` to a check, `check_it(function, seed=0)`.

    The trial draws what the function under test is given. What that returns is called
    by these names; where it is a loss, with or without statistics, its gradient with
    respect to the first few arguments (`leaves`) counts, too. Or the trial returns a
    function that maps one under test to quantities by name. `right` is a right
    function, or what the quantities should be. `mistakes` holds, by a sentence as it
    goes on after "this is what you get when", what makes a right function wrong: other
    arguments of it, a wrong function, or a list of these. The check's own `mistakes`
    are pairs of a sentence and a function.
    """
    known = [
        (sentence, functools.partial(right, **one) if isinstance(one, dict) else one)
        for sentence, change in mistakes.items()
        for one in (change if isinstance(change, list) else [change])
    ]

    def decorate(trial):
        @functools.wraps(trial)
        def checked(function, seed: int = 0) -> Result:
            drawn = trial(Case(seed))
            how = (
                (loss_and_gradient, drawn, leaves) if leaves else (_name, drawn, names)
            )
            measure = drawn if callable(drawn) else functools.partial(*how)
            expected = measure(right) if callable(right) else right

            def named():
                for sentence, wrong in known:
                    found = _as_tensors(measure(wrong))
                    same = _agree(found, _as_tensors(expected), tolerances)
                    yield sentence, {key: found[key] for key in found if not same[key]}

            name = getattr(function, "__name__", "your function")
            call = functools.partial(measure, function)
            return compare(name, call, expected, named(), tolerances)

        del checked.__wrapped__  # its own arguments are what `help` is to show
        checked.mistakes = known
        return checked

    return decorate


def _fresh(given):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in given]


def _name(given, names, function):
    found = function(*_fresh(given))
    return dict(zip(names, found if len(names) > 1 else [found], strict=False))


def loss_and_gradient(given, leaves: int, function, **options) -> dict:
    """Of a loss function: its value, gradient and statistics.

    The gradient with respect to the first few arguments, 0 where there is none.
    """
    given = _fresh(given)
    inputs = [x.requires_grad_() for x in given[:leaves]]
    found = function(*given, **options)
    loss, stats = found if isinstance(found, tuple) else (found, {})
    slopes = [None] * leaves
    if loss.requires_grad:
        slopes = torch.autograd.grad(loss, inputs, allow_unused=True)
    pairs = zip(slopes, inputs, strict=True)
    slopes = [torch.zeros_like(x) if slope is None else slope for slope, x in pairs]
    return {"loss": loss, "gradient": torch.stack(slopes).squeeze(0), **stats}


def compare(name: str, call, expected: dict, mistakes=(), tolerances=None) -> Result:
    """Compare what `call()` returns with what is expected, and print the outcome.

    `expected` maps the name of each quantity to a tensor or number; `call()` must
    return the same names. `mistakes` holds pairs of a sentence, as it goes on after
    "this is what you get when", and the quantities after that mistake; it is named if
    it explains the first wrong quantity and agrees on all that it lists. `tolerances`
    maps names of quantities to bounds other than `TOLERANCE`.
    """
    expected = _as_tensors(expected)
    try:
        got = call()
        if missing := [key for key in expected if key not in got]:
            return _failed(name, math.inf, f"it gives no {' and no '.join(missing)}")
        got = _as_tensors({key: got[key] for key in expected})
    except Exception as error:  # a learner's function may fail in any way
        return _failed(name, math.inf, f"it raised {type(error).__name__}: {error}")
    for key, value in expected.items():
        if got[key].shape != value.shape:
            shapes = f"{tuple(got[key].shape)}, expected {tuple(value.shape)}"
            return _failed(name, math.inf, f"its {key} has the shape {shapes}")
    same = _agree(got, expected, tolerances)
    wrong = [key for key in expected if not same[key]]
    # What has a bound of its own (a sample, float32) would hide the rest
    compared = wrong or [key for key in expected if key not in (tolerances or {})]
    compared = compared or list(expected)
    largest = max(_difference(got[key], expected[key]) for key in compared)
    if not wrong:
        print(f"✓ {name}: largest difference {largest:.1e}")
        return Result(True, largest, "")
    for sentence, changed in mistakes:
        agrees = _agree(got, _as_tensors(changed), tolerances)
        if wrong[0] in changed and all(agrees.values()):
            message = f"this is what you get when {sentence}"
            return _failed(name, largest, message)
    message = _where(wrong[0], got[wrong[0]], expected[wrong[0]])
    return _failed(name, largest, message)


def _failed(name, difference, message):
    print(f"✗ {name}: largest difference {difference:.1e}; {message}")
    return Result(False, difference, message)


def _as_tensors(quantities):
    return {
        key: torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        for key, value in quantities.items()
    }


def _agree(got, others, tolerances):
    """For each of the other quantities, whether it is near enough."""
    bounds = dict.fromkeys(others, TOLERANCE) | (tolerances or {})
    return {
        key: _difference(got[key], value) <= bounds[key]
        for key, value in others.items()
    }


def _difference(a, b):
    gap = (a - b).abs().max().item()
    return math.inf if math.isnan(gap) else gap


def _where(key, got, expected):
    worst = (got - expected).abs().nan_to_num(math.inf).argmax()
    index = [i.item() for i in torch.unravel_index(worst, got.shape)]
    yours, right = got.flatten()[worst].item(), expected.flatten()[worst].item()
    return f"its {key}{index or ''} is {yours:.4f}, expected {right:.4f}"
