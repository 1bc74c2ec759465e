"""Slides: what a lecturer shows of each notebook, with docs/slides.py and without."""

import re

import pytest
from traitlets.config.loader import PyFileConfigLoader

from tests.conftest import ROOT, read
from utils.settings import NOTEBOOKS

STOP = "*Before you run it:"
NO_WORD = r"<style>.*?</style>|\$\$.*?\$\$|\]\([^)]*\)"


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


def words(slide):
    """How many words of text stand on a slide, without formulas and links."""
    text = "\n".join(cell.source for cell in slide if cell.cell_type == "markdown")
    return len(re.findall(r"\S*\w\S*", re.sub(NO_WORD, "", text, flags=re.S)))


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_a_slide_is_short_and_a_stop_is_without_its_answer(name):
    """As `jupyter nbconvert --to slides` shows them, and with docs/slides.py."""
    cells = read(name).cells
    for shown in (slides(cells), slides(large(name))):
        assert max(map(words, shown)) <= 120 and len(shown) > 10
        for slide in shown:
            stop = any(STOP in cell.source for cell in slide)
            assert not stop or all(cell.cell_type == "markdown" for cell in slide)
    stops = [cell.id for cell in cells if STOP in cell.source]  # "pause and predict"
    tagged = [x.id for x in cells if "predict" in x.metadata.get("tags", [])]
    assert stops == tagged and stops
    assert sum(STOP in slide[-1].source for slide in shown) == len(stops)
    unread = {cell.id for cell in cells if "(no need to read)" in cell.source}
    skipped = [cell for cell in cells if kind(cell) == "skip"]
    assert {"parameters", "setup"} | unread <= {cell.id for cell in skipped}
    assert all(cell.cell_type == "code" for cell in skipped)  # every word is said
