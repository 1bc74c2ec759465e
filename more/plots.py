"""The pictures of the lessons in this folder."""

import matplotlib.pyplot as plt
import pandas as pd
import torch

from more.common import interval_95
from utils.plots import BLUE, GREEN, GREY, RED, smooth, subplots

PURPLE = "#8558a8"
COLOURS = (GREY, GREEN, RED, BLUE)


def plot_distributions(names: list[str], distributions: dict[str, torch.Tensor]):
    """Up to three distributions over the same few responses, side by side."""
    figure, axis = subplots(plot_distributions, 1, 1, (9, 3.2))
    table = pd.DataFrame({k: x.tolist() for k, x in distributions.items()}, names)
    table.plot.bar(ax=axis, color=(GREY, BLUE, RED), width=0.8)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_ylabel("probability of the response")
    axis.legend(frameon=False)
    return figure


def plot_policy(world, path: list[torch.Tensor], kl_coef: float, n: int):
    """Probabilities of fifteen responses: the reference's, a policy's, and the best.

    The policy is path[n], and the reference path[0]: log-probabilities (15,).
    """
    figure, axis = subplots(plot_policy, 1, 1, (7.6, 3.3))
    (best, J_best), places = world.optimum(kl_coef), range(len(path[n]))
    ref, now, most = (x.exp().tolist() for x in (path[0], path[n], best))
    axis.bar(places, ref, color=GREY, alpha=0.4, label="reference, π_ref")
    axis.bar(places, now, 0.5, color=BLUE, label="policy, π")
    axis.bar(places, most, 0.5, fill=False, edgecolor=RED, lw=2, label="best, π*")
    names = [name.rpartition(" ") for name in world.names()]
    scored = zip(names, world.scores.tolist(), strict=True)
    axis.set_xticks(places, [f"{x}\n{end}\n{R:+.1f}" for (x, _, end), R in scored])
    J_ref, J = (world.objective(path[i], kl_coef) for i in (0, n))
    kl = (path[n].exp() * (path[n] - path[0])).sum()
    said = f"rollout {n} of {len(path) - 1},  KL {kl:.2f} nats,  "
    said += f"{(J - J_ref) / (J_best - J_ref):.1%} of what there is to gain"
    axis.set_title(said, loc="left")
    top = 1.05 * torch.stack([*path, best]).max().exp().item()  # the same for every n
    axis.set(xlabel="response, and its score", ylabel="probability", ylim=(0, top))
    axis.legend(frameon=False, loc="upper right")
    plt.close(figure)  # else it would be shown twice below sliders
    return figure


def plot_moments(estimators: dict[str, tuple[float, float, float]]):
    """How far each estimator of the gradient is off on average, and how much it varies.

    By name: the bias relative to the gradient, its angle in degrees, the variance.
    """
    figure, axes = subplots(plot_moments, 1, 3, (9.6, 0.3 * len(estimators) + 0.8))
    titles = ("bias, relative", "angle to the gradient", "variance, scaled")
    units = ("share of the gradient's length", "degrees", "squared length")
    table = pd.DataFrame(estimators, titles).T.iloc[::-1]
    table.plot.barh(subplots=True, ax=axes, color=(RED, RED, BLUE), legend=False)
    for axis, unit in zip(axes, units, strict=True):
        axis.set_xlabel(unit)
        axis.label_outer()
    return figure


def plot_race(curves: dict[str, dict[str, list[list[float]]]]):
    """Score and KL of each estimator over the rollouts: mean and 95 % interval.

    By estimator, of which there are four, and figure: a curve for each seed.
    """
    figure, axes = subplots(plot_race, 1, 2, (9, 3.2))
    units = {"score": "normalised score", "kl": "nats per response"}
    for axis, key in zip(axes, units, strict=True):
        for (name, found), colour in zip(curves.items(), COLOURS, strict=True):
            mean, half = interval_95(torch.tensor(found[key]))
            axis.plot(mean, color=colour, label=name)
            edges = (mean - half, mean + half)
            axis.fill_between(range(len(mean)), *edges, color=colour, alpha=0.2)
        axis.set(title=key, xlabel="rollout", ylabel=units[key])
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
    figure, axis = subplots(plot_learning_curve, 1, 1, (6, 3.4))
    sizes, runs = [*map(int, agreement)], torch.tensor([*agreement.values()]).t()
    axis.plot(sizes, runs.t(), ".", color=GREY)
    bars = {"fmt": "o-", "capsize": 4, "color": BLUE, "label": "learnt from pairs"}
    axis.errorbar(sizes, *interval_95(runs), **bars)
    lines = ("the best any model can", ceiling, "k"), ("a coin", [0.5], GREY)
    for name, values, colour in (*lines, ("learnt from labels", labels, RED)):
        height = sum(values) / len(values)
        axis.axhline(height, color=colour, linestyle="--", linewidth=1, label=name)
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
    figure, axes = subplots(plot_dpo, 1, 4, (12.4, 2.8))
    table = pd.DataFrame(history, range(1, len(history) + 1))
    kl = pd.concat([pd.Series([0.0]), table.pop("kl").dropna()])
    steps = table.apply(smooth)
    steps["accuracy"].plot(ax=axes[0], color=BLUE, title="implicit accuracy")
    steps["margin"].plot(ax=axes[1], color=BLUE, title="margin")
    ratios = steps[["chosen_reward", "rejected_reward"]] / beta
    ratios.columns = "chosen", "rejected"
    ratios.plot(ax=axes[2], color=[BLUE, RED], title="log π − log π_ref")
    axes[2].axhline(0, color="k", linewidth=0.5)
    axes[2].legend(frameon=False)
    kl.plot(ax=axes[3], style="o-", color=BLUE, title="KL of samples", ylim=(0, None))
    units = ("share of the pairs", "labeller's units", *["nats per response"] * 2)
    for axis, unit in zip(axes, units, strict=True):
        axis.set(xlabel="step", ylabel=unit)
    return figure


def plot_ranks(shares: dict[str, torch.Tensor], enough: float = 0.9):
    """The share of each update that its first ranks hold, and where it is enough.

    By name: the shares of the first, the first two, ... singular values, squared.
    """
    figure, axis = subplots(plot_ranks, 1, 1, (6, 3.2))
    table = pd.DataFrame({name: pd.Series(x.tolist()) for name, x in shares.items()})
    table.index += 1
    table.plot(ax=axis, color=(BLUE, RED, GREEN, GREY))
    axis.axhline(enough, color="k", linestyle="--", linewidth=1)
    axis.annotate(f"{enough:.0%}", (1, enough + 0.015))
    axis.set(xlabel="rank", ylabel="share of the update", ylim=(0, 1.05))
    axis.legend(frameon=False)
    return figure


def plot_memory(found: dict[str, dict[str, float]], line: float = 0):
    """What each way keeps in memory, in MiB, as stacked bars, and one model's weights.

    By way and part: bytes. `line` is the weights of one model, dashed.
    """
    figure, axis = subplots(plot_memory, 1, 1, (7.5, 3.2))
    sizes, colours = pd.DataFrame(found).T / 2**20, (BLUE, RED, GREY, GREEN)
    sizes.plot.barh(stacked=True, ax=axis, color=colours, width=0.8)
    most = sizes.sum(axis=1)
    axis.bar_label(axis.containers[-1], [f"{x:.1f}" for x in most], padding=3)
    axis.axvline(line / 2**20, color="k", linestyle="--", linewidth=1)
    axis.set(xlabel="MiB (dashed: the weights of one model)", xlim=(0, 1.1 * max(most)))
    axis.invert_yaxis()
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def plot_frontier(points: dict[str, list[dict]]):
    """What each judge calls positive against the KL spent, for each way to spend it.

    `points` maps the name of a way to points with a `label`, a `kl` in nats, and
    `shares`: the share of texts that each judge calls positive; where several runs
    were averaged, half the widths of their intervals as `kl_95` and `shares_95`. A way
    of one point is a star, and the best possible a dashed line. The first and the last
    point of each are labelled.
    """
    judges = list(next(iter(points.values()))[0]["shares"])
    n = len(judges)
    figure, axes = subplots(plot_frontier, 1, n, (4.2 * n, 3.8), sharey=True)
    # Colour, marker, and where a label stands: of neighbours on different sides
    styles = [(BLUE, "o-", (9, -11)), (RED, "s-", (0, 8)), (GREEN, "^-", (0, -16))]
    styles = iter([*styles, (PURPLE, "v-", (13, -3))])
    for way, line in points.items():
        if way.startswith("best possible"):
            colour, style, aside = GREY, "d--", (13, -3)
        else:
            star = "black", "*", (13, -3)
            colour, style, aside = star if len(line) == 1 else next(styles)
        table = pd.json_normalize(sorted(line, key=lambda point: point["kl"]))
        for axis, judge in zip(axes, judges, strict=True):
            x, y = table["kl"], table[f"shares.{judge}"]
            axis.plot(x, y, style, markersize=7, color=colour, label=way)
            if "kl_95" in table:
                half = table[f"shares_95.{judge}"], table["kl_95"]
                how = {"ecolor": colour, "elinewidth": 1, "alpha": 0.5}
                axis.errorbar(x, y, *half, fmt="none", **how)
            how = {"ha": "center", "fontsize": 8, "color": colour}
            for i in {0, len(x) - 1}:  # those between would lie on each other
                place = {"xytext": aside, "textcoords": "offset points"}
                axis.annotate(table["label"][i], (x[i], y[i]), **place, **how)
    most = max(point["kl"] for line in points.values() for point in line)
    for axis, judge in zip(axes, judges, strict=True):
        axis.set(title=judge, xlabel="KL to the SFT model [nats]")
        axis.set_xlim(-0.03 * most, 1.1 * most)  # an interval may be longer
    axes[0].set_ylabel("share judged positive")
    axes[1].legend(frameon=False, loc="lower right")
    return figure
