"""The pictures of the lessons in this folder."""

import torch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from more.common import interval_95
from utils.plots import BLUE, GREEN, GREY, RED, smooth, subplots

PURPLE = "#8558a8"
# Where a label may stand around its point, the best first [points]
DIRECTIONS = ((0, 9), (10, 0), (0, -9), (-10, 0), (9, 7), (9, -7), (-9, 7), (-9, -7))


def axes_of(plot, rows, columns, width=3.2, height=2.6):
    """A picture and its axes, each of this size."""
    return subplots(plot, rows, columns, (width * columns, height * rows))


def plot_distributions(names: list[str], distributions: dict[str, torch.Tensor]):
    """Up to three distributions over the same few responses, side by side."""
    figure, axis = axes_of(plot_distributions, 1, 1, width=9, height=3.2)
    colours, width = (GREY, BLUE, RED), 0.8 / len(distributions)
    for i, (label, probs) in enumerate(distributions.items()):
        shift = (i - (len(distributions) - 1) / 2) * width
        places = [place + shift for place in range(len(names))]
        axis.bar(places, probs.tolist(), width, color=colours[i], label=label)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_ylabel("probability of the response")
    axis.legend(frameon=False)
    return figure


def plot_moments(estimators: dict[str, tuple[float, float, float]]):
    """How far each estimator of the gradient is off on average, and how much it varies.

    By name: the bias relative to the gradient, its angle in degrees, the variance.
    """
    figure, axes = axes_of(plot_moments, 1, 3, height=0.3 * len(estimators) + 0.8)
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


def plot_race(curves: dict[str, dict[str, list[list[float]]]]):
    """Score and KL of each estimator over the rollouts: mean and 95 % interval.

    By estimator, of which there are four at most, and figure: a curve for each seed.
    """
    figures = {"score": "normalised score", "kl": "nats per response"}
    figure, axes = axes_of(plot_race, 1, len(figures), width=4.5, height=3.2)
    for axis, (key, unit) in zip(axes, figures.items(), strict=True):
        colours = (GREY, GREEN, RED, BLUE)[-len(curves) :]
        for (name, found), colour in zip(curves.items(), colours, strict=True):
            mean, half = interval_95(torch.tensor(found[key]))
            axis.plot(mean, color=colour, label=name)
            edges = (mean - half, mean + half)
            axis.fill_between(range(len(mean)), *edges, color=colour, alpha=0.2)
        axis.set(title=key, xlabel="rollout", ylabel=unit)
    axes[1].set_ylim(bottom=0)  # where a symmetrical interval goes on
    axes[0].legend(frameon=False)
    return figure


def plot_learning_curve(
    agreement: dict[str, list[float]], ceiling: list[float], labels: list[float]
):
    """Agreement with the labeller on new prompts, against the number of pairs learnt.

    `agreement` by the number of pairs, with a value for each seed; `ceiling` and
    `labels` (of the model that learnt from labels) by seed, as dashed lines.
    """
    figure, axis = axes_of(plot_learning_curve, 1, 1, width=6, height=3.4)
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


def plot_dpo(history: list[dict], beta: float):
    """What to watch of DPO: accuracy, margin, both log-ratios, and the KL of samples.

    The steps hold `accuracy`, `margin`, `chosen_reward` and `rejected_reward`, and some
    of them a `kl`. Smoothed; a log-ratio is an implicit reward divided by beta.
    """
    figure, axes = axes_of(plot_dpo, 1, 4, width=3.1, height=2.8)

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


def plot_ranks(shares: dict[str, torch.Tensor], enough: float = 0.9):
    """The share of each update that its first ranks hold, and where it is enough.

    By name: the shares of the first, the first two, ... singular values, squared.
    """
    figure, axis = axes_of(plot_ranks, 1, 1, width=6, height=3.2)
    colours = (BLUE, RED, GREEN, GREY)
    for (name, share), colour in zip(shares.items(), colours, strict=False):
        ranks = range(1, len(share) + 1)
        axis.plot(ranks, share, color=colour, label=name)
    axis.axhline(enough, color="k", linestyle="--", linewidth=1)
    axis.annotate(f"{enough:.0%}", (1, enough + 0.015))
    axis.set(xlabel="rank", ylabel="share of the update", ylim=(0, 1.05))
    axis.legend(frameon=False)
    return figure


def plot_memory(found: dict[str, dict[str, float]], line: float = 0):
    """What each way keeps in memory, in MiB, as stacked bars, and one model's weights.

    By way and part: bytes. `line` is the weights of one model, dashed.
    """
    figure, axis = axes_of(plot_memory, 1, 1, width=7.5, height=3.2)
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


def plot_frontier(points: dict[str, list[dict]]):
    """What each judge calls positive against the KL spent, for each way to spend it.

    `points` maps the name of a way to points with a `label`, a `kl` in nats, and
    `shares`: the share of texts that each judge calls positive; where several runs
    were averaged, half the widths of their intervals as `kl_95` and `shares_95`. A way
    of one point is a star, and the best possible a dashed line.
    """
    judges = list(next(iter(points.values()))[0]["shares"])
    figure, axes = axes_of(plot_frontier, 1, len(judges), width=4.2, height=3.8)
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


def plot_two_processes():
    """One rollout and its update on two processes, from left to right: not to scale."""
    figure, axis = subplots(plot_two_processes, 1, 1, (9.5, 2.6))
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


def plot_steered(tokens: list[str], ratios: list[float]):
    """The tokens that PPO has made likelier (blue) and less likely (red), as bars."""
    figure, axis = axes_of(plot_steered, 1, 1, width=6, height=0.22 * len(tokens) + 0.7)
    colours = [BLUE if ratio > 0 else RED for ratio in ratios]
    axis.barh(range(len(tokens)), ratios, color=colours)
    axis.set_yticks(range(len(tokens)), tokens)
    axis.axvline(0, color="k", linewidth=0.5)
    axis.set_xlabel("mean of log π − log π_ref [nats]")
    return figure
