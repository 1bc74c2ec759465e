"""The map between a video and the notebooks, there and back."""

import json
import re
import shutil

from tests.conftest import ROOT, read, refused
from utils.settings import NOTEBOOKS
from workshop import video

FIRST, THIRD = NOTEBOOKS["1"], NOTEBOOKS["3"]


def test_links_come_once_and_go_again(tmp_path):
    """In copies of the notebooks, which have those of the file that is here."""
    for file in ("docs/video.json", *NOTEBOOKS.values()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def linked(**times):
        none = {"video": None, **dict.fromkeys(NOTEBOOKS.values(), {})}
        (tmp_path / "docs/video.json").write_text(json.dumps(none | times), "utf8")
        lines = video.link(tmp_path)
        return lines, [(tmp_path / x).read_bytes() for x in NOTEBOOKS.values()]

    here = json.loads((ROOT / "docs/video.json").read_text("utf8"))
    files = [(ROOT / name).read_bytes() for name in NOTEBOOKS.values()]
    assert linked(**here)[1] == files
    refused("1-SFT.*no data that", linked, video="https://v", **{FIRST: {"data": 0}})
    asked = {"video": "https://video/watch?v=a", FIRST: {"data-text": 95, "title": 0}}
    asked[THIRD] = {"video": "https://youtu.be/b", "loop-text": 3725}
    _, bare = linked()
    lines, texts = linked(**asked)
    assert linked(**asked) == (lines, texts) and linked() == ([], bare)

    colab = re.search(r"https://colab[^)]*/1-SFT.ipynb", read(FIRST).cells[0].source)[0]
    assert lines[1:3] == [
        f"0:00:00 1 · Supervised fine-tuning {colab}#scrollTo=title",
        f"0:01:35 The data set {colab}#scrollTo=data-text",
    ]
    first, third = texts[0].decode(), texts[2].decode()
    assert "## The data set [▶ 0:01:35](https://video/watch?v=a&t=95)" in first
    assert "### The PPO loop [▶ 1:02:05](https://youtu.be/b?t=3725)" in third
