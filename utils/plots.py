"""Every picture of the series."""

import base64
import functools
import io

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image

from utils.evaluation import interval_95
from utils.ppo import kl_estimate

BLUE, RED, GREY, GREEN = "#3b6fb6", "#c8553d", "#8a8a8a", "#4c9f70"
PURPLE = "#8558a8"

# The curves of PPO: the key in the history, the title, the unit, and what is healthy
CURVES = [
    ("score", "score", "normalised score", None),
    ("kl", "KL to the reference", "nats per response", (0, 15)),
    ("entropy", "entropy", "nats per token", None),
    ("approx_kl", "approx_kl of an update", "nats per token", (0, 0.02)),
    ("clip_fraction", "clip fraction", "share of the tokens", (0, 0.2)),
    ("explained_variance", "explained variance", "share of the variance", (0, 1)),
]


# Where a label may stand around its point, the best first [points]
DIRECTIONS = ((0, 9), (10, 0), (0, -9), (-10, 0), (9, 7), (9, -7), (-9, 7), (-9, -7))

BOXES = {  # name: (x, y, text, colour, notebook)
    "gpt2": (0.9, 3, "GPT-2", GREY, None),
    "sft": (3.6, 4.6, "1 · SFT\npredict the next token\nof film reviews", BLUE, 1),
    "rm": (3.6, 1.4, "2 · Reward model\npredict the label:\npraise or blame", RED, 2),
    "policy": (7.2, 4.6, "policy\nwrites a review", BLUE, 3),
    "reference": (10.6, 4.6, "reference: SFT model,\nfrozen. How far is it?", GREY, 3),
    "reward": (7.2, 1.4, "reward model\nscores it", RED, 3),
    "update": (10.6, 1.4, "3 · PPO\nbetter than expected?\nmake it likelier", BLUE, 3),
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


class Picture(Figure):
    """A figure that a notebook shows sharply, with words for who cannot see it."""

    alt = ""

    def _ipython_display_(self):  # a bundle would lose to Jupyter's own picture of it
        data, metadata = self.as_png()
        display({**data, "text/plain": repr(self)}, metadata=metadata, raw=True)

    def as_png(self) -> tuple[dict, dict]:
        """The picture and what is said of it, as a notebook keeps them."""
        file, small = io.BytesIO(), io.BytesIO()
        self.savefig(file, dpi=2 * self.dpi)  # two dots for each of the page's
        few_colours = Image.open(file).convert("RGB").quantize(128)
        few_colours.save(small, "PNG", optimize=True)  # a third of the size
        shown = {"alt": self.alt, "width": few_colours.width // 2}
        picture = base64.b64encode(small.getvalue()).decode()
        return {"image/png": picture}, {"image/png": shown}


def _described(plot):
    """Let the first line of a function's docstring describe what it draws."""

    @functools.wraps(plot)
    def draw(*arguments, **options):
        figure = plot(*arguments, **options)
        figure.alt = plot.__doc__.partition("\n")[0]
        return figure

    return draw


def _subplots(rows, columns, size, **options):
    options |= {"figsize": size, "layout": "constrained", "FigureClass": Picture}
    return plt.subplots(rows, columns, **options)


def _axes(rows, columns, width=3.2, height=2.6):
    figure, axes = _subplots(rows, columns, (width * columns, height * rows))
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


@_described
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


@_described
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


@_described
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


@_described
def plot_ppo(history: list[dict], before: list[dict] = ()):
    """The curves of a PPO run, one point per rollout, over what is healthy (green).

    `before` is the history of another run, for comparison, in grey.
    """
    figure, axes = _axes(2, 3, width=4.2, height=3)
    for axis, (name, title, unit, healthy) in zip(axes.flat, CURVES, strict=True):
        axis.plot([step[name] for step in before], color=GREY, linewidth=1)
        axis.plot([step[name] for step in history], color=BLUE)
        low, high = axis.get_ylim()
        if healthy:
            axis.axhspan(*healthy, color=GREEN, alpha=0.12, linewidth=0)
            low, high = min(low, healthy[0]), high if name == "kl" else max(high, 0.01)
        axis.set(title=title, ylabel=unit, ylim=(low, high))
    for axis in axes[-1]:
        axis.set_xlabel("rollout")
    figure.get_layout_engine().set(hspace=0.08)
    return figure


@_described
def plot_rewards(before: list[float], after: list[float]):
    """Rewards of the same prompts' responses before and after PPO."""
    figure, axis = _axes(1, 1, width=6, height=3)
    groups = {"bins": 20, "range": (-1, 1), "label": ["before", "after"]}
    axis.hist([before, after], color=[RED, BLUE], **groups)
    axis.set(xlabel="reward, 2σ(raw logit) − 1", ylabel="responses")
    axis.legend(frameon=False)
    return figure


@_described
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


@_described
def plot_moments(estimators: dict[str, tuple[float, float, float]]):
    """How far each estimator of the gradient is off on average, and how much it varies.

    By name: the bias relative to the gradient, its angle in degrees, the variance.
    """
    figure, axes = _axes(1, 3, height=0.3 * len(estimators) + 0.8)
    titles = ("bias, relative", "angle to the gradient", "variance, scaled")
    units = ("share of the gradient's length", "degrees", "squared length")
    names, columns = list(estimators), zip(*estimators.values(), strict=True)
    colours = (RED, RED, BLUE)
    for axis, x, *texts, colour in zip(
        axes, columns, titles, units, colours, strict=True
    ):
        axis.barh(names, x, color=colour)
        axis.set(title=texts[0], xlabel=texts[1])
        axis.invert_yaxis()
        axis.label_outer()
    return figure


@_described
def plot_race(curves: dict[str, dict[str, list[list[float]]]]):
    """Score and KL of each estimator over the rollouts: mean and 95 % interval.

    By estimator, of which there are four at most, and figure: a curve for each seed. Of
    fewer than five, whose interval would say little, each is shown.
    """
    figures = {"score": "normalised score", "kl": "nats per response"}
    figure, axes = _axes(1, len(figures), width=4.5, height=3.2)
    for axis, (key, unit) in zip(axes, figures.items(), strict=True):
        colours = (GREY, GREEN, RED, BLUE)[-len(curves) :]
        for (name, found), colour in zip(curves.items(), colours, strict=True):
            runs = torch.tensor(found[key])
            mean, half = interval_95(runs)
            axis.plot(mean, color=colour, label=name)
            if len(runs) < 5:
                axis.plot(runs.t(), color=colour, linewidth=0.8, alpha=0.5)
                continue
            edges = (mean - half, mean + half)
            axis.fill_between(range(len(mean)), *edges, color=colour, alpha=0.2)
        axis.set(title=key, xlabel="rollout", ylabel=unit)
    axes[1].set_ylim(bottom=0)  # where a symmetrical interval goes on
    axes[0].legend(frameon=False)
    return figure


@_described
def plot_learning_curve(
    agreement: dict[str, list[float]], ceiling: list[float], labels: list[float]
):
    """Agreement with the labeller on new prompts, against the number of pairs learnt.

    `agreement` by the number of pairs, with a value for each seed; `ceiling` and
    `labels` (of the model that learnt from labels) by seed, as dashed lines.
    """
    figure, axis = _axes(1, 1, width=6, height=3.4)
    sizes = [int(size) for size in agreement]
    runs = torch.tensor(list(agreement.values())).t()
    middle, half = interval_95(runs) if len(runs) > 1 else (runs[0], 0 * runs[0])
    for seed in runs:
        axis.plot(sizes, seed, ".", color=GREY)
    axis.errorbar(
        sizes, middle, half, fmt="o-", capsize=4, color=BLUE, label="learnt from pairs"
    )
    lines = {
        "the best any model can": (ceiling, "k"),
        "learnt from labels": (labels, RED),
    }
    for name, (values, colour) in lines.items():
        height = sum(values) / len(values)
        axis.axhline(height, color=colour, linestyle="--", linewidth=1, label=name)
    axis.axhline(0.5, color=GREY, linestyle=":", linewidth=1, label="a coin")
    axis.set(xscale="log", xlabel="pairs", ylabel="agreement")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


@_described
def plot_dpo(history: list[dict], beta: float):
    """What to watch of DPO: accuracy, margin, both log-ratios, and the KL of samples.

    The steps hold `accuracy`, `margin`, `chosen_reward` and `rejected_reward`, and some
    of them a `kl`. Smoothed; a log-ratio is an implicit reward divided by beta.
    """
    figure, axes = _axes(1, 4, width=3.1, height=2.8)

    def curve(axis, name, colour, label=None, scale=1.0):
        values = [scale * step[name] for step in history]
        axis.plot(smooth(values), color=colour, label=label)

    curve(axes[0], "accuracy", BLUE)
    axes[0].set(title="implicit accuracy", ylabel="share of the pairs")
    curve(axes[1], "margin", BLUE)
    axes[1].set(title="margin", ylabel="labeller's units")
    curve(axes[2], "chosen_reward", BLUE, "chosen", 1 / beta)
    curve(axes[2], "rejected_reward", RED, "rejected", 1 / beta)
    axes[2].axhline(0, color="k", linewidth=0.5)
    axes[2].set(title="log π − log π_ref", ylabel="nats per response")
    axes[2].legend(frameon=False)
    measured = [(step, row["kl"]) for step, row in enumerate(history) if "kl" in row]
    axes[3].plot(*zip((0, 0.0), *measured, strict=True), "o-", color=BLUE)
    axes[3].set(title="KL of samples", ylabel="nats per response", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
    return figure


@_described
def plot_ranks(shares: dict[str, torch.Tensor], enough: float = 0.9):
    """The share of each update that its first ranks hold, and where it is enough.

    By name: the shares of the first, the first two, ... singular values, squared.
    """
    figure, axis = _axes(1, 1, width=6, height=3.2)
    colours = (BLUE, RED, GREEN, GREY)
    for (name, share), colour in zip(shares.items(), colours, strict=False):
        ranks = range(1, len(share) + 1)
        axis.plot(ranks, share, color=colour, label=name)
    axis.axhline(enough, color="k", linestyle="--", linewidth=1)
    axis.annotate(f"{enough:.0%}", (1, enough + 0.015))
    axis.set(xlabel="rank", ylabel="share of the update", ylim=(0, 1.05))
    axis.legend(frameon=False)
    return figure


@_described
def plot_memory(found: dict[str, dict[str, float]], line: float = 0):
    """What each way keeps in memory, in MiB, as stacked bars, and one model's weights.

    By way and part: bytes. `line` is the weights of one model, dashed.
    """
    figure, axis = _axes(1, 1, width=7.5, height=3.2)
    parts = list(next(iter(found.values())))
    names, left = list(found), [0.0] * len(found)
    colours = (BLUE, RED, GREY, GREEN)
    for part, colour in zip(parts, colours, strict=True):
        sizes = [one[part] / 2**20 for one in found.values()]
        axis.barh(names, sizes, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.bar_label(axis.containers[-1], [f"{x:.1f}" for x in left], padding=3)
    axis.axvline(line / 2**20, color="k", linestyle="--", linewidth=1)
    axis.set(xlabel="MiB (dashed: the weights of one model)", xlim=(0, 1.1 * max(left)))
    axis.invert_yaxis()
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


@_described
def plot_frontier(points: dict[str, list[dict]]):
    """What each judge calls positive against the KL spent, for each way to spend it.

    `points` maps the name of a way to points with a `label`, a `kl` in nats, and
    `shares`: the share of texts that each judge calls positive; where several runs
    were averaged, half the widths of their intervals as `kl_95` and `shares_95`. A way
    of one point is a star, and the best possible a dashed line.
    """
    judges = list(next(iter(points.values()))[0]["shares"])
    figure, axes = _axes(1, len(judges), width=4.2, height=3.8)
    styles = iter([(BLUE, "o-"), (RED, "s-"), (GREEN, "^-"), (PURPLE, "v-")])
    drawn = {}
    for way, line in points.items():
        if len(line) == 1:
            drawn[way] = ("black", "*")
        elif way.startswith("best possible"):
            drawn[way] = (GREY, "d--")
        else:
            drawn[way] = next(styles)
    for axis, judge in zip(figure.axes, judges, strict=True):
        for way, (colour, style) in drawn.items():
            line = sorted(points[way], key=lambda point: point["kl"])
            places = [(point["kl"], point["shares"][judge]) for point in line]
            x, y = zip(*places, strict=True)
            axis.plot(x, y, style, markersize=7, color=colour, label=way)
            if "kl_95" in line[0]:
                widths = [(one["shares_95"][judge], one["kl_95"]) for one in line]
                bars = {"ecolor": colour, "elinewidth": 1, "alpha": 0.5}
                axis.errorbar(x, y, *zip(*widths, strict=True), fmt="none", **bars)
        axis.set(title=judge, xlabel="KL to the SFT model [nats]")
        axis.sharey(figure.axes[0])
        axis.margins(x=0.15, y=0.15)
    figure.axes[0].set_ylabel("share judged positive")
    places = [place for line in points.values() for place in line]
    averaged = any("kl_95" in place for place in places)
    if averaged:  # the points fix the axis: a bar may be longer than it
        ends = [pick(place["kl"] for place in places) for pick in (min, max)]
        margin = 0.15 * (ends[1] - ends[0])
        limits = (ends[0] - margin, ends[1] + margin)
        for axis in figure.axes:
            axis.set_xlim(limits)
    # where there is room
    figure.axes[0 if averaged else -1].legend(frameon=False, loc="lower right")
    figure.canvas.draw()  # from here on it is known where everything stands
    for axis, judge in zip(figure.axes, judges, strict=True):
        _label_points(axis, judge, points, [colour for colour, _ in drawn.values()])
    return figure


def _label_points(axis, judge, points, colours):
    """A label beside each point, where it hides neither a point nor another label."""
    named = [
        (point["label"], (point["kl"], point["shares"][judge]), colour)
        for line, colour in zip(points.values(), colours, strict=False)
        for point in line
    ]
    dots = [axis.transData.transform(place) for _, place, _ in named]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    around = [(r * dx, r * dy) for r in (1, 2, 3) for dx, dy in DIRECTIONS]
    for label, place, colour in named:
        options = {"textcoords": "offset points", "ha": "center", "va": "center"}
        text = axis.annotate(label, place, (0, 0), fontsize=8, color=colour, **options)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        for offset in around:
            text.set_position(offset)
            box = text.get_window_extent().padded(1)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


@_described
def plot_stages(here: int = 0):
    """GPT-2 becomes the SFT model and the reward model; PPO goes round with both.

    `here` is the number of the notebook to mark: 1, 2 or 3; 0 marks none.
    """
    figure, axis = _subplots(1, 1, (9.5, 4.2))
    axis.set(xlim=(0, 12.4), ylim=(0.4, 5.6))
    axis.axis("off")
    drawn = {}
    for name, (x, y, text, colour, notebook) in BOXES.items():
        face = "#fff3c4" if notebook == here else "white"
        box = {"boxstyle": "round,pad=0.6", "facecolor": face, "edgecolor": colour}
        drawn[name] = axis.text(x, y, text, ha="center", va="center", bbox=box)
    if here:
        axis.text(0.1, 5.4, f"yellow: this notebook, {here} of 3", va="top")
    figure.canvas.draw()
    for start, end in ARROWS:
        style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 4, "shrinkB": 4}
        ends = {"patchA": drawn[start], "patchB": drawn[end]}
        style |= {name: text.get_bbox_patch() for name, text in ends.items()}
        axis.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops=style)
    return figure


@_described
def plot_two_processes():
    """One rollout and its update on two processes, from left to right: not to scale."""
    figure, axis = _subplots(1, 1, (9.5, 2.6))
    axis.set(xlim=(0, 12.4), ylim=(-0.1, 3))
    axis.axis("off")
    half = {"A": "first half", "B": "second half"}
    for y, name, sampling in ((1.6, "A", 2.4), (0.4, "B", 3.0)):
        axis.text(0, y + 0.35, name, va="center", fontsize=12)
        blocks = [
            (0.5, sampling, f"samples and scores\nits prompts: {half[name]}", BLUE)
        ]
        blocks.append((4.4, 1.9, "advantages\nof all", GREY))
        for i, start in enumerate((6.5, 9.5), start=1):
            text = f"gradient of its rows\nof minibatch {i}"
            blocks.append((start, 2.1 if name == "A" else 1.9, text, RED))
        for start, width, text, colour in blocks:
            style = {"facecolor": "white", "edgecolor": colour}
            axis.barh(y, width, 0.7, start, align="edge", **style)
            middle = start + width / 2, y + 0.35
            axis.text(*middle, text, ha="center", va="center", fontsize=8)
    for x, text in (
        (3.9, "gather: all have\nthe rollout"),
        (8.9, "add"),
        (11.9, "add"),
    ):
        axis.plot((x, x), (0.3, 2.4), color=GREEN, linewidth=3)
        axis.text(x, 2.5, text, ha="center", color=GREEN, fontsize=9)
    return figure


@_described
def plot_kl_estimators(pi: torch.Tensor, ref: torch.Tensor):
    """k1, k2 and k3 over the log-ratio; and mean and spread of each under pi (V,)."""
    figure, (left, right) = _axes(1, 2, width=4.8, height=3.4)
    colours = {"k1": BLUE, "k2": GREY, "k3": RED}
    ratios = torch.linspace(-1.5, 1.5, 100)
    exact = (pi * (pi / ref).log()).sum()
    right.axhline(exact, color="k", linestyle="--", linewidth=1, label="exact KL")
    for kind, colour in colours.items():
        left.plot(ratios, kl_estimate(ratios, 0 * ratios, kind), color=colour)
        left.annotate(kind, (1.5, kl_estimate(ratios, 0 * ratios, kind)[-1]))
        estimates = kl_estimate(pi.log(), ref.log(), kind)
        mean = (pi * estimates).sum()
        spread = (pi * (estimates - mean) ** 2).sum().sqrt()
        right.errorbar(kind, mean, spread, fmt="o", capsize=6, color=colour)
    left.axhline(0, color="k", linewidth=0.5)
    left.set(title="one token", xlabel="log-ratio ℓ = log π − log π_ref [nats]")
    left.set_ylabel("estimate [nats]")
    right.set(title="mean and standard deviation", ylabel="nats")
    right.legend(frameon=False)
    return figure


@_described
def plot_clipping(clip_range: float):
    """The loss of one token over its ratio, for a good and for a bad one."""
    figure, axes = _axes(1, 2, width=4.8, height=3.4)
    ratio = torch.linspace(0.4, 1.6, 200)
    near = ratio.clamp(1 - clip_range, 1 + clip_range)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        loss = torch.maximum(-advantage * ratio, -advantage * near)
        axis.plot(ratio, -advantage * ratio, "--", color=GREY, label="−A ρ")
        axis.plot(ratio, loss, color=BLUE, label="clipped")
        axis.axvspan(1 - clip_range, 1 + clip_range, color=GREEN, alpha=0.12)
        axis.axvline(1, color="k", linewidth=0.5)
        kind = "better than expected" if advantage > 0 else "worse than expected"
        axis.set(title=f"A = {advantage:+.0f}: {kind}", xlabel="ratio ρ", ylabel="loss")
        axis.legend(frameon=False)
    return figure


@_described
def plot_response(tokens: list[str], bars: dict[str, list[float]]):
    """What PPO knows of each token of a response: one row of bars for each name."""
    size = (max(6.0, 0.8 * len(tokens) + 1.5), 1.4 * len(bars))
    figure, axes = _subplots(len(bars), 1, size, sharex=True)
    for axis, (name, values) in zip(axes, bars.items(), strict=True):
        colours = [BLUE if value >= 0 else RED for value in values]
        axis.bar(range(len(tokens)), values, color=colours)
        axis.axhline(0, color="k", linewidth=0.5)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=16)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(tokens)), tokens)
    return figure


@_described
def plot_steered(tokens: list[str], ratios: list[float]):
    """The tokens that PPO has made likelier (blue) and less likely (red), as bars."""
    figure, axis = _axes(1, 1, width=6, height=0.22 * len(tokens) + 0.7)
    colours = [BLUE if ratio > 0 else RED for ratio in ratios]
    axis.barh(range(len(tokens)), ratios, color=colours)
    axis.set_yticks(range(len(tokens)), tokens)
    axis.axvline(0, color="k", linewidth=0.5)
    axis.set_xlabel("mean of log π − log π_ref [nats]")
    return figure
