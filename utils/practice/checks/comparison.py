"""What is compared with what is expected, and said about it in one line."""

import math
from dataclasses import dataclass

import torch

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

    def same(key, value):
        return _difference(got[key], value) <= (tolerances or {}).get(key, TOLERANCE)

    wrong = [key for key, value in expected.items() if not same(key, value)]
    # What has a bound of its own (a sample, float32) would hide the rest
    compared = wrong or [key for key in expected if key not in (tolerances or {})]
    compared = compared or list(expected)
    largest = max(_difference(got[key], expected[key]) for key in compared)
    if not wrong:
        print(f"✓ {name}: largest difference {largest:.1e}")
        return Result(True, largest, "")
    for sentence, changed in mistakes:
        changed = _as_tensors(changed)
        if wrong[0] in changed and all(same(*item) for item in changed.items()):
            message = f"this is what you get when {sentence}"
            return _failed(name, largest, message)
    message = _where(wrong[0], got[wrong[0]], expected[wrong[0]])
    return _failed(name, largest, message)


def name_of(function):
    """What the outcome calls a function."""
    return getattr(function, "__name__", "your function")


def _failed(name, difference, message):
    print(f"✗ {name}: largest difference {difference:.1e}; {message}")
    return Result(False, difference, message)


def _as_tensors(quantities):
    return {
        key: torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        for key, value in quantities.items()
    }


def _difference(a, b):
    gap = (a - b).abs().max().item()
    return math.inf if math.isnan(gap) else gap


def _where(key, got, expected):
    worst = (got - expected).abs().nan_to_num(math.inf).argmax()
    index = [i.item() for i in torch.unravel_index(worst, got.shape)]
    yours, right = got.flatten()[worst].item(), expected.flatten()[worst].item()
    return f"its {key}{index or ''} is {yours:.4f}, expected {right:.4f}"
