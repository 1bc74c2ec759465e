"""Every picture of the series."""

import matplotlib.pyplot as plt
import torch

BLUE, RED, GREY = "#3b6fb6", "#c8553d", "#8a8a8a"

# The curves of PPO: the key in the history, the title, a level to compare with.
CURVES = [
    ("score", "score (normalised)", None),
    ("kl", "KL to the reference [nats]", None),
    ("entropy", "entropy [nats per token]", None),
    ("approx_kl", "approx_kl of an update [nats]", None),
    ("clip_fraction", "clip fraction", None),
    ("ratio_mean", "mean ratio", 1),
    ("ratio_max", "largest ratio", 1),
    ("value_loss", "value loss", None),
    ("explained_variance", "explained variance", 0),
    ("eos_rate", "EOS rate", 1),
    ("length", "response length [tokens]", None),
    ("kl_coef", "KL coefficient β", None),
]


def _axes(rows, columns, width=3.2, height=2.6):
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_reviews(labels, lengths, min_tokens: int):
    """How many reviews are positive, and how long they are in tokens."""
    figure, (left, right) = _axes(1, 2, width=4.5)
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


def smooth(values, weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for step, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**step))
    return out


def plot_losses(train_losses, validation: dict[int, float], ylabel: str):
    """The training loss of every step, smoothed, and the validation loss at some."""
    figure, axis = _axes(1, 1, width=6, height=3.2)
    axis.plot(train_losses, color=GREY, alpha=0.3, label="training, each batch")
    axis.plot(smooth(train_losses), color=BLUE, label="training, smoothed")
    axis.plot(
        *zip(*validation.items(), strict=True), "o--", color=RED, label="validation"
    )
    axis.set(xlabel="optimiser steps", ylabel=ylabel)
    axis.legend(frameon=False)
    return figure


def plot_classifier(logits: torch.Tensor, labels: torch.Tensor):
    """Confusion matrix, calibration and scores of a classifier on N labelled texts."""
    figure, (left, middle, right) = _axes(1, 3, width=3.6, height=3.2)
    truth, guess = labels.long(), (logits > 0).long()
    names = ["negative", "positive"]
    counts = torch.zeros(2, 2, dtype=torch.long)
    for t, g in zip(truth, guess, strict=True):
        counts[t, g] += 1
    left.imshow(counts, cmap="Blues")
    for t in range(2):
        for g in range(2):
            dark = counts[t, g] > counts.max() / 2
            left.text(g, t, int(counts[t, g]), ha="center", color="w" if dark else "k")
    left.set(title="confusion", xlabel="predicted", ylabel="label")
    left.set_xticks([0, 1], names)
    left.set_yticks([0, 1], names, rotation=90, va="center")
    probability = torch.sigmoid(logits)
    bins = (probability * 10).long().clamp(max=9)
    filled = [b for b in range(10) if (bins == b).any()]
    predicted = [probability[bins == b].mean() for b in filled]
    observed = [truth[bins == b].float().mean() for b in filled]
    middle.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfect")
    middle.plot(predicted, observed, "o", color=BLUE, label="reward model")
    middle.set(title="calibration", xlabel="predicted P(positive)")
    middle.set(ylabel="share that is positive")
    middle.legend(frameon=False)
    groups = [logits[truth == value].numpy() for value in (0, 1)]
    right.hist(groups, bins=25, color=[RED, BLUE], label=names)
    right.set(title="raw scores", xlabel="logit", ylabel="texts")
    right.legend(frameon=False)
    return figure


def plot_ppo(history: list[dict]):
    """The curves of a PPO run, one point per rollout."""
    figure, axes = _axes(3, 4)
    for axis, (name, title, level) in zip(axes.flat, CURVES, strict=True):
        if level is not None:
            axis.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axis.plot([step[name] for step in history], color=BLUE)
        axis.set_title(title, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("rollout")
    return figure


def plot_rewards(before: list[float], after: list[float]):
    """Rewards of the same prompts' responses before and after PPO."""
    figure, axis = _axes(1, 1, width=6, height=3)
    groups = {"bins": 20, "range": (-1, 1), "label": ["before", "after"]}
    axis.hist([before, after], color=[RED, BLUE], **groups)
    axis.set(xlabel="reward, 2σ(raw logit) − 1", ylabel="responses")
    axis.legend(frameon=False)
    return figure


def plot_distributions(names: list[str], distributions: dict[str, torch.Tensor]):
    """Up to three distributions over the same few responses, side by side."""
    figure, axis = _axes(1, 1, width=9, height=3.2)
    colours, width = (GREY, BLUE, RED), 0.8 / len(distributions)
    for i, (label, probs) in enumerate(distributions.items()):
        shift = (i - (len(distributions) - 1) / 2) * width
        places = [place + shift for place in range(len(names))]
        axis.bar(places, probs.tolist(), width, color=colours[i], label=label)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_ylabel("probability of the response")
    axis.legend(frameon=False)
    return figure


def plot_frontier(points: dict[str, list[dict]]):
    """What each judge calls positive against the KL spent, for each way to spend it.

    `points` maps the name of a way, three at most, to points with a `label`, a `kl` in
    nats, and `shares`: the share of texts that each judge calls positive.
    """
    judges = list(next(iter(points.values()))[0]["shares"])
    figure, axes = _axes(1, len(judges), width=3.8, height=3.4)
    # Where the labels stand: to the lower right of a point, to the right, or above it
    styles = [(BLUE, "o", (5, -11)), (RED, "s", (-2, 6)), ("black", "*", (6, -3))]
    for axis, judge in zip(figure.axes, judges, strict=True):
        for (way, line), (colour, marker, offset) in zip(
            points.items(), styles, strict=False
        ):
            line = sorted(line, key=lambda point: point["kl"])
            places = [(point["kl"], point["shares"][judge]) for point in line]
            x, y = zip(*places, strict=True)
            axis.plot(x, y, marker=marker, markersize=7, color=colour, label=way)
            for point, place in zip(line, places, strict=True):
                options = {"textcoords": "offset points", "fontsize": 8}
                axis.annotate(point["label"], place, offset, color=colour, **options)
        axis.set(title=judge, xlabel="KL to the SFT model [nats]")
        axis.sharey(figure.axes[0])
        axis.margins(x=0.12, y=0.12)
    figure.axes[0].set_ylabel("share judged positive")
    figure.axes[-1].legend(frameon=False, loc="lower right")
    return figure
