"""The pictures in docs/: `python -m tools.pictures`, after a tiny run."""

import json
import sys

import matplotlib

matplotlib.use("Agg")

import torch

from more.plots import plot_frontier
from practice.cells import import_cells
from tools.stages import plot_clipping, plot_kl_estimators, plot_stages
from utils.plots import plot_ppo
from utils.runs import NOTEBOOKS, ROOT
from utils.settings import TINY


def plot_exact_world():
    """What PPO finds in the exact world, as in notebook 5, which is run for it."""
    cells = ("loop", "exact-world", "exact-objective", "train-exactly")
    return import_cells(NOTEBOOKS["5"], *cells, "exact-result", "exact-plot")["figure"]


def main():
    """Write them all; training.png and frontier.png show a tiny run.

    Raises SystemExit if there is no tiny run.
    """
    found = {}
    for file in ("policy/metrics.json", "frontier.json"):
        path = ROOT / TINY.folder / file
        if not path.exists():
            sys.exit(f"{path} is missing; run `python -m utils --only 1,2,3,6` first")
        found[file] = json.loads(path.read_text())
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    figures = {
        "stages": plot_stages(),
        "kl-estimators": plot_kl_estimators(pi, ref),  # those of notebook 3
        "clipping": plot_clipping(0.2),
        "exact-world": plot_exact_world(),
        "training": plot_ppo(found["policy/metrics.json"]["history"]),
        "frontier": plot_frontier(found["frontier.json"]),
    }
    for name, figure in figures.items():
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
