"""What is drawn, compared with what is expected, and said about it in one line."""

import functools
import math
from dataclasses import dataclass

import torch

TOLERANCE = 1e-5  # float32's on numbers near 1; the known mistakes are far larger


class Case:
    """Random responses: one ends at once, one never does, the others in between.

    What stands outside the mask is as large as what stands inside, so that a slot
    too many shows.
    """

    def __init__(self, seed, batch=5, length=7):
        self.generator = torch.Generator().manual_seed(seed)
        between = torch.randint(2, length, (batch - 2,), generator=self.generator)
        self.lengths = torch.tensor([1, length, *between.tolist()])
        self.mask = (torch.arange(length) < self.lengths[:, None]).long()

    def normal(self, *shape):
        """Normal numbers of this shape, or one for each slot."""
        shape = shape or self.mask.shape
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low, high, shape):
        """Whole numbers from `low` to below `high`."""
        return torch.randint(low, high, shape, generator=self.generator)

    def uniform(self, low, high):
        """A number between `low` and `high`."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()


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
            expected = _as_tensors(measure(right) if callable(right) else right)

            def named():
                for sentence, wrong in known:
                    found = _as_tensors(measure(wrong))
                    differ = _apart(found, expected, tolerances)
                    yield sentence, {key: found[key] for key in differ}

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
    slopes = [torch.zeros_like(x) for x in inputs]
    if loss.requires_grad:
        how = {"allow_unused": True, "materialize_grads": True}
        slopes = torch.autograd.grad(loss, inputs, **how)
    return {"loss": loss, "gradient": torch.stack(list(slopes)).squeeze(0), **stats}


def compare(name: str, call, expected: dict, mistakes=(), tolerances=None) -> Result:
    """Compare what `call()` returns with what is expected, and print the outcome.

    `expected` maps the name of each quantity to a tensor or number; `call()` must
    return the same names. `mistakes` holds pairs of a sentence, as it goes on after
    "this is what you get when", and the quantities after that mistake; it is named if
    it explains the first wrong quantity and agrees on all that it lists. `tolerances`
    maps names of quantities to bounds other than `TOLERANCE`.
    """
    expected, difference = _as_tensors(expected), math.inf

    def result(message=""):
        sign, end = ("✗", f"; {message}") if message else ("✓", "")
        print(f"{sign} {name}: largest difference {difference:.1e}{end}")
        return Result(not message, difference, message)

    try:
        got = call()
        if missing := [key for key in expected if key not in got]:
            return result(f"it gives no {' and no '.join(missing)}")
        got = _as_tensors({key: got[key] for key in expected})
    except Exception as error:  # a learner's function may fail in any way
        return result(f"it raised {type(error).__name__}: {error}")
    for key, value in expected.items():
        if got[key].shape != value.shape:
            shapes = f"{tuple(got[key].shape)}, expected {tuple(value.shape)}"
            return result(f"its {key} has the shape {shapes}")
    wrong = _apart(got, expected, tolerances)
    # What has a bound of its own (a sample, float32) would hide the rest
    compared = wrong or [key for key in expected if key not in (tolerances or {})]
    gaps = [_gap(got[key], expected[key]) for key in compared or expected]
    difference = max(gaps)
    if not wrong:
        return result()
    for sentence, changed in mistakes:
        if wrong[0] in changed and not _apart(got, _as_tensors(changed), tolerances):
            return result(f"this is what you get when {sentence}")
    yours, right = got[wrong[0]], expected[wrong[0]]
    worst = (yours - right).abs().nan_to_num(math.inf).argmax()
    place = [i.item() for i in torch.unravel_index(worst, yours.shape)] or ""
    yours, right = (x.flatten()[worst].item() for x in (yours, right))
    return result(f"its {wrong[0]}{place} is {yours:.4f}, expected {right:.4f}")


def _as_tensors(quantities):
    return {
        key: torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        for key, value in quantities.items()
    }


def _gap(a, b):
    return (a - b).abs().nan_to_num(math.inf, math.inf).max().item()


def _apart(got, others, tolerances):
    """The names of those of the other quantities that are too far away."""
    bounds = dict.fromkeys(others, TOLERANCE) | (tolerances or {})
    return [key for key, x in others.items() if not _gap(got[key], x) <= bounds[key]]
