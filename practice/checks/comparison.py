"""What is drawn, compared with what is expected, and said about it in one line."""

import functools
import inspect
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

    difference: float  # the largest; inf if there was nothing to compare with
    message: str  # what is wrong, or empty

    def __bool__(self):
        return not self.message

    def _ipython_display_(self):
        """Show nothing: as the last value of a cell it would be printed twice."""


def check(right, mistakes: dict, *names: str, leaves=0, read=lambda found: found):
    """A decorator: from `trial(case)` to a check, `check_it(function, seed=0)`.

    The trial draws the arguments of one call, or a dict of several calls, by what is
    added to the names of their quantities. `names` are those of what a call returns, a
    dict has its own; behind a loss stands its gradient with respect to the first few
    arguments (`leaves`). `read` is for a function that makes a layer: what the layer
    does. `mistakes` holds, by a sentence as it goes on after "this is what you get
    when", what makes the right function wrong: other arguments of it, a wrong function,
    or a list of these. The check's own `mistakes` are pairs of sentence and function.
    """
    known = [
        (sentence, one if callable(one) else _changed(right, one))
        for sentence, change in mistakes.items()
        for one in (change if isinstance(change, list) else [change])
    ]

    def decorate(trial):
        def checked(function, seed: int = 0) -> Result:
            calls = trial(Case(seed))
            calls = calls if isinstance(calls, dict) else {"": calls}
            measure = functools.partial(_quantities, calls, names, leaves, read)
            name = getattr(function, "__name__", "your function")
            with torch.random.fork_rng():  # for layers with random weights
                torch.manual_seed(seed)
                expected = _as_tensors(measure(right))
                found = ((text, _as_tensors(measure(wrong))) for text, wrong in known)
                named = (
                    (text, {k: x[k] for k in _apart(x, expected)}) for text, x in found
                )
                return compare(name, lambda: measure(function), expected, named)

        checked.__name__, checked.__doc__ = trial.__name__, trial.__doc__
        checked.mistakes = known
        return checked

    return decorate


def _changed(right, change):
    """The right function with other values for some of its arguments, by name."""
    names = list(inspect.signature(right).parameters)
    return lambda *given: right(**dict(zip(names, given, strict=False)) | change)


def _quantities(calls, names, leaves, read, function) -> dict:
    """What a function returns in these calls; a gradient is 0 where there is none."""
    quantities = {}
    for added, given in calls.items():
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        inputs = [x.requires_grad_() for x in given[:leaves]]
        found = read(function(*given))
        found = found if isinstance(found, tuple) else (found,)
        if leaves:
            # So that it has a gradient, if only 0
            loss = found[0] + 0 * sum(x.sum() for x in inputs)
            slopes = torch.stack(torch.autograd.grad(loss, inputs))
            found = (loss, slopes.squeeze(0), *found[1:])
        for name, x in zip(names, found, strict=False):
            own = x if isinstance(x, dict) else {name: x}
            quantities |= {f"{key}{added}": value for key, value in own.items()}
    return quantities


def compare(
    name: str, call, expected: dict, mistakes=(), tolerance=TOLERANCE
) -> Result:
    """Compare what `call()` returns with what is expected, and print the outcome.

    `expected` maps the name of each quantity to a tensor or number; `call()` must
    return the same names. `mistakes` holds pairs of a sentence, as it goes on after
    "this is what you get when", and the quantities after that mistake; it is named if
    it explains the first wrong quantity and agrees on all that it lists.
    """
    expected, difference = _as_tensors(expected), math.inf

    def result(message=""):
        sign, end = ("✗", f"; {message}") if message else ("✓", "")
        print(f"{sign} {name}: largest difference {difference:.1e}{end}")
        return Result(difference, message)

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
    wrong = _apart(got, expected, tolerance)
    gaps = [_gaps(got[key], expected[key]).max().item() for key in wrong or expected]
    difference = max(gaps)
    if not wrong:
        return result()
    for sentence, changed in mistakes:
        if wrong[0] in changed and not _apart(got, _as_tensors(changed), tolerance):
            return result(f"this is what you get when {sentence}")
    yours, right = got[wrong[0]], expected[wrong[0]]
    worst = _gaps(yours, right).argmax()
    place = [i.item() for i in torch.unravel_index(worst, yours.shape)] or ""
    yours, right = (x.flatten()[worst].item() for x in (yours, right))
    return result(f"its {wrong[0]}{place} is {yours:.4f}, expected {right:.4f}")


def _as_tensors(quantities):
    return {
        key: torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        for key, value in quantities.items()
    }


def _gaps(a, b):
    return (a - b).abs().nan_to_num(math.inf, math.inf)


def _apart(got, others, tolerance=TOLERANCE):
    """The names of those of the other quantities that are too far away."""
    return [key for key, x in others.items() if _gaps(got[key], x).max() > tolerance]
