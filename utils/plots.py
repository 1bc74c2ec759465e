"""Every picture of lessons 1 to 3 that shows a run."""

import base64
import io

import matplotlib.pyplot as plt
import pandas
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

BLUE, RED, GREY, GREEN = "#3b6fb6", "#c8553d", "#8a8a8a", "#4c9f70"
# The curves of PPO: the key in the history, the title, the unit, and what is healthy
CURVES = [
    ("score", "score", "normalised score", None),
    ("kl", "KL to the reference", "nats per response", (0, 15)),
    ("entropy", "entropy", "nats per token", None),
    ("approx_kl", "approx_kl of an update", "nats per token", (0, 0.02)),
    ("clip_fraction", "clip fraction", "share of the tokens", (0, 0.2)),
    ("explained_variance", "explained variance", "share of the variance", (0, 1)),
]


class Picture(Figure):
    """A figure that a notebook shows sharply, with alternative text for a reader."""

    alt = ""

    def _ipython_display_(self):  # Jupyter prefers its own picture to a MIME bundle
        data, metadata = self.as_png()
        display({**data, "text/plain": repr(self)}, metadata=metadata, raw=True)

    def as_png(self) -> tuple[dict, dict]:
        """The picture and what is said of it, as a notebook keeps them."""
        file, small = io.BytesIO(), io.BytesIO()
        self.savefig(file, dpi=2 * self.dpi)  # for screens of twice as many dots
        few_colours = Image.open(file).convert("RGB").quantize(128)
        few_colours.save(small, "PNG", optimize=True)  # a third of the size
        shown = {"alt": self.alt, "width": few_colours.width // 2}
        picture = base64.b64encode(small.getvalue()).decode()
        return {"image/png": picture}, {"image/png": shown}


def subplots(plot, rows, columns, size, **options):
    """A picture and its axes; the first line of `plot`'s docstring is its alt text."""
    options |= {"figsize": size, "layout": "constrained", "FigureClass": Picture}
    figure, axes = plt.subplots(rows, columns, **options)
    figure.alt = plot.__doc__.partition("\n")[0]
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_reviews(labels, lengths, min_tokens: int):
    """How many reviews are positive, and how long they are in tokens."""
    figure, (left, right) = subplots(plot_reviews, 1, 2, (9, 2.6))
    counts = [sum(label == value for label in labels) for value in (0, 1)]
    bars = left.bar(["negative (0)", "positive (1)"], counts, color=[RED, BLUE])
    left.bar_label(bars)
    left.set(title="label balance", ylabel="phrases")
    right.hist(lengths, bins=range(1, max(lengths) + 2), color=GREY)
    right.axvline(min_tokens, color=RED, linestyle="--", label="kept from here")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(title="length", xlabel="tokens with EOS", ylabel="phrases")
    right.legend(frameon=False)
    return figure


def smooth(values, weight: float = 0.95) -> pandas.Series:
    """Exponential moving average, corrected for its start."""
    return pandas.Series(values).ewm(alpha=1 - weight).mean()


def plot_losses(train_losses, validation: dict[int, float], ylabel: str):
    """The training loss of every step, smoothed, and the validation loss at some."""
    figure, axis = subplots(plot_losses, 1, 1, (6, 3.2))
    axis.plot(train_losses, color=GREY, alpha=0.3, label="training, each batch")
    axis.plot(smooth(train_losses), color=BLUE, label="training, smoothed")
    steps, losses = zip(*validation.items(), strict=True)
    axis.plot(steps, losses, "o--", color=RED, label="validation")
    axis.set(xlabel="optimiser steps", ylabel=ylabel)
    axis.legend(frameon=False)
    return figure


def plot_classifier(logits: torch.Tensor, labels: torch.Tensor):
    """Confusion matrix and raw scores of a classifier on N labelled texts."""
    figure, (left, right) = subplots(plot_classifier, 1, 2, (7.6, 3.2))
    truth, guess, names = labels.long(), (logits > 0).long(), ["negative", "positive"]
    counts = torch.bincount(2 * truth + guess, minlength=4).view(2, 2)
    left.imshow(counts, cmap="Blues")
    for t, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
        colour = "w" if counts[t, g] > counts.max() / 2 else "k"
        left.text(g, t, int(counts[t, g]), ha="center", color=colour)
    left.set(title="confusion", xlabel="predicted", ylabel="label")
    left.set_xticks([0, 1], names)
    left.set_yticks([0, 1], names, rotation=90, va="center")
    groups = [logits[truth == value].numpy() for value in (0, 1)]
    right.hist(groups, bins=25, color=[RED, BLUE], label=names)
    right.set(title="raw scores", xlabel="logit", ylabel="texts")
    right.legend(frameon=False)
    return figure


def plot_ppo(history: list[dict], before: list[dict] = (), whole: int = 0):
    """The curves of a PPO run, one point per rollout, over what is healthy (green).

    `before` is the history of another run, for comparison, in grey. Updates that took
    fewer steps than others, or than a `whole` one, are crossed.
    """
    figure, axes = subplots(plot_ppo, 2, 3, (12.6, 6))
    steps = [step.get("optimizer_steps", 0) for step in history]
    for axis, (name, title, unit, healthy) in zip(axes.flat, CURVES, strict=True):
        axis.plot([step[name] for step in before], color=GREY, linewidth=1)
        axis.plot([step[name] for step in history], color=BLUE)
        low, high = axis.get_ylim()
        if healthy:
            axis.axhspan(*healthy, color=GREEN, alpha=0.12)
            for edge in healthy:
                axis.axhline(edge, color=GREEN, linewidth=0.8)
            low, high = min(low, healthy[0]), high if name == "kl" else max(high, 0.01)
        if name == "approx_kl":
            early = [i for i, n in enumerate(steps) if n < max([whole, *steps])]
            axis.plot(early, [history[i][name] for i in early], "x", color=RED)
        axis.set(title=title, xlabel="rollout", ylabel=unit, ylim=(low, high))
    return figure


def plot_rewards(before: list[float], after: list[float]):
    """Rewards of the same prompts' responses before and after PPO."""
    figure, axis = subplots(plot_rewards, 1, 1, (6, 3))
    names = ["before", "after"]
    axis.hist([before, after], 10, range=(-1, 1), color=[RED, BLUE], label=names)
    axis.set(xlabel="reward, 2σ(raw logit) − 1", ylabel="responses")
    axis.legend(frameon=False)
    return figure


def plot_response(tokens: list[str], bars: dict[str, list[float]]):
    """What PPO knows of each token of a response: one row of bars for each name."""
    size = (max(6.0, 0.8 * len(tokens) + 1.5), 1.4 * len(bars))
    figure, axes = subplots(plot_response, len(bars), 1, size, sharex=True)
    for axis, (name, values) in zip(axes, bars.items(), strict=True):
        colours = [BLUE if value >= 0 else RED for value in values]
        axis.bar(range(len(tokens)), values, color=colours)
        axis.axhline(0, color="k", linewidth=0.5)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=16)
    axes[-1].set_xticks(range(len(tokens)), tokens)
    return figure
