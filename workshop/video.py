"""From the notebooks into a video and back: `python -m workshop.video`.

docs/video.json says at which second each cell begins, {notebook: {cell id: seconds}},
and in which "video"; a notebook may have another "video" of its own.
"""

import json
import re
import sys
from datetime import timedelta
from pathlib import Path

import nbformat

from utils.settings import NOTEBOOKS, ROOT

LINK = re.compile(r" \[▶ [\d:]+\]\([^)]*\)$")
COLAB = re.compile(r"https://colab[^)]*\.ipynb(?=\))")


def link(root: Path = ROOT) -> list[str]:
    """Write the links into the notebooks; the lines of the list of chapters.

    A link ends the first line of a text cell, its heading where it has one. What is no
    longer in the file loses its link. Raises ValueError for an entry without a place.
    """
    times = json.loads((root / "docs/video.json").read_text("utf8"))
    lines = []
    for name in NOTEBOOKS.values():
        starts, chapters = dict(times[name]), []
        video = starts.pop("video", times["video"])
        text = (root / name).read_text("utf8")
        notebook = nbformat.reads(text, as_version=4)
        cells = {x.id: x for x in notebook.cells if x.cell_type == "markdown"}
        if starts and (not video or starts.keys() - cells.keys()):
            lost = ", ".join(starts.keys() - cells.keys()) or '"video"'
            raise ValueError(f"{name} in docs/video.json: no {lost} that it could mean")
        for cell in cells.values():
            first, *rest = cell.source.split("\n")
            first = LINK.sub("", first)
            if (start := starts.get(cell.id)) is not None:
                place = COLAB.search(notebook.cells[0].source)[0]
                clock, title = timedelta(seconds=start), first.lstrip("# ")
                line = f"{clock} {title} {place}#scrollTo={cell.id}"
                chapters.append((start, line))
                at = f"{video}{'&' if '?' in video else '?'}t={start}"
                first += f" [▶ {clock}]({at})"
            cell.source = "\n".join([first, *rest])
        if (new := nbformat.writes(notebook) + "\n") != text:
            (root / name).write_text(new, encoding="utf8")
        lines += [f"{name}: {video}"] * bool(chapters)
        lines += [line for _, line in sorted(chapters)]
    return lines


if __name__ == "__main__":
    try:
        print(*link() or ["docs/video.json has no times: no links"], sep="\n")
    except ValueError as error:
        sys.exit(str(error))
