"""The lecture's script fits the notebooks: cells, numbers, minutes."""

import re

import pytest

from tests.conftest import ROOT, read
from tests.lessons.test_notebook_files import strays
from tests.lessons.test_slides import kind
from utils.settings import NOTEBOOKS

SCRIPT = (ROOT / "docs/lecture.md").read_text("utf8")
LECTURES = dict(zip("123", SCRIPT.split("\n## ")[1:], strict=True))
CUE = re.compile(r"^### (.+) · (\d+) min$", re.M)


@pytest.mark.parametrize("number", LECTURES)
def test_the_script_names_every_cell_that_is_shown_in_order(number):
    """And its title has the sum of the minutes."""
    cells = [cell.id for cell in read(NOTEBOOKS[number]).cells if kind(cell) != "skip"]
    named, total = [], 0
    for cue, minutes in CUE.findall(LECTURES[number]):
        first, *last = re.findall(r"`([\w-]+)`", cue)
        assert not last or " to " in cue
        named += cells[cells.index(first) : cells.index((last or [first])[0]) + 1]
        total += int(minutes)
    assert named == cells
    title = LECTURES[number].partition("\n")[0]
    assert title.endswith(f"({NOTEBOOKS[number]}, {total} minutes)")


@pytest.mark.parametrize("number", LECTURES)
def test_a_number_that_is_said_stands_on_the_page(number):
    assert not [*strays(LECTURES[number], [NOTEBOOKS[number]])]
