"""What the checks say to learners; that they catch mistakes is in test_mutants."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch

from utils import ppo
from utils.practice import checks


def test_a_pass_prints_one_line_and_is_true(capsys):
    result = checks.check_gae(ppo.compute_gae)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✓ compute_gae: largest difference ")
    assert result and result.passed and result.difference < 1e-12
    assert result._ipython_display_() is None  # a cell does not show it twice


def stub(rewards, values, mask, gamma, lam):
    return None


def crash(rewards, values, mask, gamma, lam):
    return rewards.nothing, values


def transposed(rewards, values, mask, gamma, lam):
    return rewards.T, values.T


def nan(rewards, values, mask, gamma, lam):
    return rewards * math.nan, values


def nonsense(rewards, values, mask, gamma, lam):
    return rewards * 0 + 42, values


@pytest.mark.parametrize(
    "function, says",
    [
        (stub, "raised TypeError"),
        (crash, "raised AttributeError.*nothing"),
        (transposed, r"advantages has the shape \(7, 5\), expected \(5, 7\)"),
        (nan, r"advantages\[\d, \d\] is nan, expected"),
        (nonsense, r"advantages\[\d, \d\] is 42.0000, expected"),
    ],
)
def test_any_failure_is_a_line_and_not_a_crash(function, says, capsys):
    result = checks.check_gae(function)
    assert not result
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {function.__name__}: largest difference")
    assert len(out.splitlines()) == 1
    assert math.isinf(result.difference) == (function is not nonsense)
    assert re.search(says, result.message)


def test_the_inputs_are_the_learners_to_change():
    """A function that works in place is judged by its result."""

    def in_place(x, mask):
        x -= x[mask.bool()].mean()
        x /= x[mask.bool()].std(correction=0)
        x[mask == 0] = 0
        return x

    assert checks.check_whiten(in_place)


def test_a_loss_may_come_without_statistics():
    def alone(*arguments):
        return ppo.value_loss(*arguments)[0]

    result = checks.check_value_loss(alone)
    assert not result and "gives no value_clip_fraction" in result.message


def test_inputs_are_fresh_for_each_seed():
    seen = []

    def spy(x, mask):
        seen.append(x)
        return ppo.masked_whiten(x, mask)

    assert checks.check_whiten(spy, 0) and checks.check_whiten(spy, 1)
    assert checks.check_whiten(spy, 0)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_the_checks_use_torch_alone():
    """Nothing of the code that they check, and no other library."""
    imported = set()
    files = sorted(Path(checks.__file__).parent.rglob("*.py"))
    assert len(files) > 1
    trees = [ast.parse(file.read_bytes()) for file in files]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    others = {name for name in imported if not name.startswith(f"{checks.__name__}.")}
    assert others == {"math", "statistics", "dataclasses", "types", "torch"}
