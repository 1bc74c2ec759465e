"""Every known mistake is caught, and the right code is not accused."""

import pytest

from tests.mutants import CORRECT, LOOP, MATHEMATICS
from utils.support.notebook import ROOT

SEEDS = range(100)
TABLE = "mutants x checks"


def name_of(check):
    return check.__name__


@pytest.mark.parametrize("check", CORRECT, ids=name_of)
def test_the_right_function_passes_its_check(check, report):
    results = [check(CORRECT[check], seed) for seed in SEEDS]
    accused = [result.message for result in results if not result]
    line = f"{'our ' + CORRECT[check].__name__:42} {name_of(check):26} {len(accused):3}"
    report(TABLE, f"{line} of {len(SEEDS)} seeds fail")
    assert accused == []


@pytest.mark.parametrize(
    "mutant", MATHEMATICS, ids=lambda m: f"{name_of(m.check)}-{m.mistake}"
)
def test_a_mistake_of_the_mathematics_is_caught_and_named(mutant, report):
    results = [mutant.check(mutant.function, seed) for seed in SEEDS]
    caught = [result.message for result in results if not result]
    named = [message for message in caught if mutant.diagnosis in message]
    line = f"{mutant.mistake:42} {name_of(mutant.check):26} {len(caught):3}"
    report(TABLE, f"{line} of {len(SEEDS)} seeds fail, {len(named)} rightly named")
    assert len(caught) == len(SEEDS)
    assert named == caught


def of_a_loop(mutant):
    """Those of adapters take seconds each, for a base and an adapter are built."""
    slow = "adapter" in mutant.mistake or "base" in mutant.mistake
    return pytest.param(mutant, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("mutant", map(of_a_loop, LOOP), ids=lambda m: m.mistake)
def test_a_mistake_of_the_loop_is_caught(mutant, report):
    mutant.run(False)
    with pytest.raises(mutant.error, match=mutant.says or None):
        mutant.run(True)
    report(TABLE, f"{mutant.mistake:42} {mutant.caught_by}: caught")


def test_every_check_has_mutants_and_a_page_counts_them():
    assert {mutant.check for mutant in MATHEMATICS} == set(CORRECT)
    page = (ROOT / "docs/how-we-know.md").read_text("utf8")
    assert f"{len(MATHEMATICS)} wrong variants of the mathematics" in page
    assert f"{len(LOOP)} mistakes of the loop" in page
