"""The pictures in docs/: `python -m tools.pictures`, after a tiny run."""

import json
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from utils.plots import (
    BLUE,
    GREY,
    RED,
    plot_frontier,
    plot_ppo,
)
from utils.settings import TINY
from utils.support.notebook import NOTEBOOKS, ROOT, import_cells

BOXES = {  # name: (x, y, text, colour)
    "gpt2": (0.9, 3, "GPT-2", GREY),
    "sft": (3.6, 4.6, "1 · SFT\npredict the next token\nof film reviews", BLUE),
    "rm": (3.6, 1.4, "2 · Reward model\npredict the label:\npraise or blame", RED),
    "policy": (7.2, 4.6, "policy\nwrites a review", BLUE),
    "reference": (10.6, 4.6, "frozen reference\nhow far has it strayed?", GREY),
    "reward": (7.2, 1.4, "reward model\nscores it", RED),
    "update": (10.6, 1.4, "3 · PPO\nbetter than expected?\nmake it more likely", BLUE),
}
ARROWS = [  # from, to
    ("gpt2", "sft"),
    ("gpt2", "rm"),
    ("sft", "policy"),
    ("rm", "reward"),
    ("policy", "reward"),
    ("policy", "reference"),
    ("reward", "update"),
    ("reference", "update"),
    ("update", "policy"),
]


def plot_stages():
    """GPT-2 becomes the SFT model and the reward model; PPO goes round with both."""
    figure, axis = plt.subplots(figsize=(9.5, 4.2), layout="constrained")
    axis.set(xlim=(0, 12.4), ylim=(0.4, 5.6))
    axis.axis("off")
    drawn = {}
    for name, (x, y, text, colour) in BOXES.items():
        box = {"boxstyle": "round,pad=0.6", "facecolor": "white", "edgecolor": colour}
        drawn[name] = axis.text(x, y, text, ha="center", va="center", bbox=box)
    figure.canvas.draw()
    for start, end in ARROWS:
        style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 4, "shrinkB": 4}
        style |= {
            "patchA": drawn[start].get_bbox_patch(),
            "patchB": drawn[end].get_bbox_patch(),
        }
        axis.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops=style)
    return figure


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
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
