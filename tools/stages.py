"""The drawings of the lessons that show no run: `python -m tools.pictures`."""

import torch

from utils.plots import BLUE, GREEN, GREY, RED, subplots
from utils.ppo import kl_estimate

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


def plot_stages(here: int = 0):
    """GPT-2 becomes the SFT model and the reward model; PPO goes round with both.

    `here` is the number of the notebook to mark: 1, 2 or 3; 0 marks none.
    """
    figure, axis = subplots(plot_stages, 1, 1, (9.5, 4.2))
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


def plot_kl_estimators(pi: torch.Tensor, ref: torch.Tensor):
    """k1, k2 and k3 over the log-ratio; and mean and spread of each under pi (V,)."""
    figure, (left, right) = subplots(plot_kl_estimators, 1, 2, (9.6, 3.4))
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


def plot_clipping(clip_range: float):
    """The loss of one token over its ratio, for a good and for a bad one."""
    figure, axes = subplots(plot_clipping, 1, 2, (9.6, 3.4))
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
