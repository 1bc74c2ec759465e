"""The README's two pictures: `python -m utils.support.pictures`, after a tiny run."""

import json
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from utils.plots import BLUE, GREY, RED, plot_ppo
from utils.settings import TINY
from utils.support.notebook import ROOT

STAGES = [  # title, what goes in, what happens, what comes out
    (
        "1 · SFT",
        "GPT-2\n+ reviews",
        "predict the\nnext token",
        "SFT model\nwrites reviews",
    ),
    (
        "2 · Reward model",
        "GPT-2\n+ labels",
        "predict the\nsentiment",
        "reward model\nscores reviews",
    ),
    (
        "3 · PPO",
        "SFT model\n+ reward model",
        "write, score,\nimprove",
        "policy\nwrites praise",
    ),
]


def plot_stages():
    """The three stages, a row each: what goes in, what happens, what comes out."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(0, 6))
    axis.axis("off")
    for row, (title, *texts) in enumerate(STAGES):
        y = 5 - 2 * row
        axis.text(0, y, title, fontsize=12, fontweight="bold", va="center")
        for column, (text, colour) in enumerate(
            zip(texts, (GREY, RED, BLUE), strict=True)
        ):
            x = 3.6 + 2.6 * column
            box = {
                "boxstyle": "round,pad=0.5",
                "facecolor": "white",
                "edgecolor": colour,
            }
            axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box)
            if column:
                arrow = {"arrowstyle": "->", "color": GREY}
                axis.annotate("", (x - 0.85, y), (x - 1.75, y), arrowprops=arrow)
    return figure


def main():
    """Write docs/stages.png, and docs/training.png from the figures of a tiny run."""
    metrics = ROOT / TINY.folder / "metrics.json"
    if not metrics.exists():
        sys.exit(f"{TINY.folder}/metrics.json is missing; run `python -m utils` first")
    history = json.loads(metrics.read_text())["policy"]["history"]
    (ROOT / "docs").mkdir(exist_ok=True)
    for name, figure in (("stages", plot_stages()), ("training", plot_ppo(history))):
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
