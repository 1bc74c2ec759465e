"""The map between a video and the notebooks, there and back."""

import json
import re
import shutil

import pytest

from tests.conftest import ROOT, read
from utils.runs import NOTEBOOKS
from workshop import video

TIMES = json.loads((ROOT / "docs/video.json").read_text("utf8"))
FIRST, THIRD = NOTEBOOKS["1"], NOTEBOOKS["3"]


@pytest.fixture
def copy(tmp_path):
    """`copy(times)` makes the links in a copy: the lines, and all files' bytes."""
    for file in ("docs/video.json", *NOTEBOOKS.values()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def link(times):
        (tmp_path / "docs/video.json").write_text(json.dumps(times), "utf8")
        lines = video.link(tmp_path)
        return lines, [(tmp_path / x).read_bytes() for x in NOTEBOOKS.values()]

    return link


def test_the_notebooks_have_the_links_of_the_file(copy):
    _, files = copy(TIMES)
    assert files == [(ROOT / name).read_bytes() for name in NOTEBOOKS.values()]


def test_links_come_once_and_go_again(copy):
    none = {name: {} for name in NOTEBOOKS.values()}
    own = {"video": "https://youtu.be/b", "loop-text": 3725}
    asked = {"video": "https://video/watch?v=a", FIRST: {"data-text": 95, "title": 0}}
    _, bare = copy({"video": None, **none})
    lines, linked = copy({**none, **asked, THIRD: own})
    assert copy({**none, **asked, THIRD: own}) == (lines, linked)
    assert copy({"video": None, **none}) == ([], bare)

    colab = re.search(r"https://colab[^)]*/1-SFT.ipynb", read(FIRST).cells[0].source)[0]
    assert lines[1:3] == [
        f"0:00:00 1 · Supervised fine-tuning {colab}#scrollTo=title",
        f"0:01:35 The data set {colab}#scrollTo=data-text",
    ]
    first, third = linked[0].decode(), linked[2].decode()
    assert "## The data set [▶ 0:01:35](https://video/watch?v=a&t=95)" in first
    assert "### The PPO loop [▶ 1:02:05](https://youtu.be/b?t=3725)" in third


@pytest.mark.parametrize("url, cell", [(None, "title"), ("https://v", "data")])
def test_an_entry_without_a_place_is_named(copy, url, cell):
    """There is no video, or the cell is none of text."""
    none = {name: {} for name in NOTEBOOKS.values()}
    with pytest.raises(ValueError, match="1-SFT.*no "):
        copy({**none, "video": url, FIRST: {cell: 0}})
