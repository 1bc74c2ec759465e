"""Slides: what a lecturer shows of each notebook, with docs/slides.py and without."""

import re

import pytest
from traitlets.config.loader import PyFileConfigLoader

from tests.conftest import ROOT, read
from utils.runs import NOTEBOOKS

KINDS = {"slide", "subslide", "fragment", "skip", "notes", "-"}
STOP = "*Before you run it:"


def kind(cell):
    """Its slide type; without one it goes on with the slide above."""
    return cell.metadata.get("slideshow", {}).get("slide_type", "-")


def large(name):
    """The cells that docs/slides.py makes of a notebook's."""
    config = PyFileConfigLoader("slides.py", path=str(ROOT / "docs")).load_config()
    (preprocessor,) = config.SlidesExporter.preprocessors
    return preprocessor().preprocess(read(name), {})[0].cells


def slides(cells):
    """The cells on each slide, without those that are notes or left out."""
    shown = []
    for cell in cells:
        if kind(cell) in ("slide", "subslide") or not shown:
            shown.append([])
        if kind(cell) not in ("notes", "skip"):
            shown[-1].append(cell)
    return [slide for slide in shown if slide]


NO_WORD = r"<style>.*?</style>|\$\$.*?\$\$|\]\([^)]*\)"


def words(slide):
    """How many words of text stand on a slide, without formulas and links."""
    text = "\n".join(cell.source for cell in slide if cell.cell_type == "markdown")
    return len(re.findall(r"\S*\w\S*", re.sub(NO_WORD, "", text, flags=re.S)))


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_no_slide_has_more_than_120_words(name):
    """As `jupyter nbconvert --to slides` shows them, and with docs/slides.py."""
    for cells in (read(name).cells, large(name)):
        assert {*map(kind, cells)} <= KINDS
        long = [slide[0].source for slide in slides(cells) if words(slide) > 120]
        assert not long and len(slides(cells)) > 10


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_what_nobody_needs_to_see_is_left_out(name):
    cells = read(name).cells
    skipped = [cell for cell in cells if kind(cell) == "skip"]
    unread = {cell.id for cell in cells if "(no need to read)" in cell.source}
    assert {"parameters", "setup"} | unread <= {cell.id for cell in skipped}
    assert all(cell.cell_type == "code" for cell in skipped)  # every word is said


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_a_stop_is_marked_and_shown_without_its_answer(name):
    """Those of "pause and predict"."""
    cells = read(name).cells
    stops = {cell.id for cell in cells if STOP in cell.source}
    assert stops and stops == {
        cell.id for cell in cells if "predict" in cell.metadata.get("tags", [])
    }
    asking = [slide for slide in slides(large(name)) if STOP in slide[-1].source]
    assert len(asking) == len(stops)
    for slide in [*asking, *slides(cells)]:
        asked = [cell.id for cell in slide if STOP in cell.source]
        assert not asked or all(cell.cell_type == "markdown" for cell in slide)
