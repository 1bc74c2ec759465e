"""The pictures in docs/: `python -m tools.pictures`, after a tiny run."""

import json
import sys

import matplotlib

matplotlib.use("Agg")

from utils.plots import plot_frontier, plot_ppo, plot_stages
from utils.settings import TINY
from utils.support.notebook import NOTEBOOKS, ROOT, import_cells


def plot_exact_world():
    """What PPO finds in the exact world, as in notebook 4, which is run for it."""
    cells = ("loop", "exact-world", "exact-objective", "train-exactly")
    cells += ("exact-result", "exact-plot")
    return import_cells(NOTEBOOKS["4"], *cells)["figure"]


def main():
    """Write docs/stages.png, exact-world.png; of a tiny run training.png, frontier.png.

    Raises SystemExit if there is no tiny run.
    """
    found = {}
    for name in ("metrics", "frontier"):
        file = TINY.folder / f"{name}.json"
        if not (ROOT / file).exists():
            sys.exit(f"{file} is missing; run `python -m utils --only 1,2,3,6` first")
        found[name] = json.loads((ROOT / file).read_text())
    figures = {
        "stages": plot_stages(),
        "exact-world": plot_exact_world(),
        "training": plot_ppo(found["metrics"]["policy"]["history"]),
        "frontier": plot_frontier(found["frontier"]),
    }
    for name, figure in figures.items():
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
