"""What several lessons of this folder share: notebook 3, statistics, files."""

import contextlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from scipy.stats import t
from torch import Tensor

from practice.cells import LOOP, import_cells
from utils.settings import NOTEBOOKS

# Of notebook 3: its models, prompts and scores, its loop; and its judges
MODELS = ("load", "prompts", "prompts-of", "batch", "score", "score-function", *LOOP)
SERIES = (*MODELS, "judges", "evaluate")


def notebook_3(settings, device, *more: str, cells=SERIES) -> SimpleNamespace:
    """Models, prompts, scores, loop and judges of notebook 3, as its file defines them.

    And what `more` of its cells define. What they print has been seen there.
    """
    names, cells = {"settings": settings, "device": device}, (*cells, *more)
    with contextlib.redirect_stdout(io.StringIO()):
        return SimpleNamespace(**import_cells(NOTEBOOKS["3"], *cells, names=names))


def interval_95(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over runs (n, ...), and half the width of its 95 % interval.

    t s / sqrt(n), with the deviation s of the sample and t of Student's distribution
    (Student 1908, "The Probable Error of a Mean"). Raises ValueError for fewer than 2
    runs.
    """
    if (n := len(runs)) < 2:
        raise ValueError(f"an interval takes 2 runs or more, got {n}")
    return runs.mean(dim=0), float(t.ppf(0.975, n - 1)) * runs.std(dim=0) / n**0.5


def write_text(path: Path, text: str | bytes):
    """Write a file as a whole, on the disk when this returns: a kill leaves the old."""
    beside = Path(path).with_name(f"{Path(path).name}.unfinished")
    with beside.open("wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def peak_memory(device) -> float:
    """The most memory that this process (on a GPU: its tensors) ever held, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
