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


def plain(name):
    """The cells as `jupyter nbconvert --to slides` takes them."""
    return read(name).cells


def large(name):
    """The cells that docs/slides.py makes of them."""
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


@pytest.mark.parametrize("cells_of", [plain, large])
@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_no_slide_has_more_than_120_words(name, cells_of):
    cells = cells_of(name)
    assert {*map(kind, cells)} <= KINDS
    long = [slide[0].source for slide in slides(cells) if words(slide) > 120]
    assert not long and len(slides(cells)) > 10


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_what_nobody_needs_to_see_is_left_out(name):
    cells = {cell.id: cell for cell in plain(name)}
    skipped = {id for id, cell in cells.items() if kind(cell) == "skip"}
    unread = {id for id, cell in cells.items() if "(no need to read)" in cell.source}
    assert {"parameters", "setup"} | unread <= skipped
    assert all(cells[id].cell_type == "code" for id in skipped)  # every word is said


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_a_stop_is_marked_and_shown_without_its_answer(name):
    """Those of "pause and predict"."""
    cells = plain(name)
    stops = {cell.id for cell in cells if STOP in cell.source}
    assert stops and stops == {
        cell.id for cell in cells if "predict" in cell.metadata.get("tags", [])
    }
    asking = [slide for slide in slides(large(name)) if STOP in slide[-1].source]
    assert len(asking) == len(stops)
    for slide in [*asking, *slides(cells)]:
        asked = [cell.id for cell in slide if STOP in cell.source]
        assert not asked or all(cell.cell_type == "markdown" for cell in slide)
