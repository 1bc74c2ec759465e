"""The measurements as a Markdown table and a plot."""

import platform
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import transformers
from transformers import AutoConfig

NAMES = {"ours": "notebook", "naive": "naive loop", "peers": "TRL 1.12.0"}
TRAINERS = {**NAMES, "peers": "transformers.Trainer"}
PHASES = ("generate", "score", "log-probs", "update")
COLOURS = {"ours": "#3b6fb6", "naive": "#8a8a8a", "peers": "#c8553d"}
SHADES = ("#9ec3ea", "#f0b9a8", "#d0d0d0", "#3b6fb6")  # of the phases
GOALS = (0.5, 0.8)


def machine() -> dict:
    """What the measurements ran on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def shape_of(model) -> dict:
    """The sizes that decide the arithmetic."""
    config = AutoConfig.from_pretrained(model)
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "words": config.vocab_size,
    }


def middle(values) -> str:
    """The median, and the spread from least to most."""
    low, high = min(values), max(values)
    digits = 0 if statistics.median(values) >= 100 else 1
    text = f"{statistics.median(values):,.{digits}f}"
    if len(values) > 1:
        text += f" ({low:,.{digits}f} to {high:,.{digits}f})"
    return text


def table(head, rows) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def per_1000(found, run, phases=PHASES) -> float:
    """Seconds for 1,000 episodes; the first rollout of a run was to warm up."""
    size = found["ppo_settings"]["ppo_rollout_size"]
    rollouts = run["rollouts"][1:]
    total = sum(rollout.get(phase, 0) for rollout in rollouts for phase in phases)
    return 1000 * total / (size * len(rollouts))


def operations(found) -> float:
    """What PPO has to compute for one episode, whoever does it.

    A multiplication and an addition for each weight: the trunk for all tokens, the
    projection for those of the response; once to sample, once for the reference, once
    for the old policy, once (without projection) for the reward, and three times
    (forward, and backward twice) in each epoch of the update.
    """
    shape, settings = found["model"], found["ppo_settings"]
    lengths = (settings["prompt_min_tokens"], settings["prompt_max_tokens"])
    response = settings["max_new_tokens"]
    tokens = sum(lengths) / 2 + response
    trunk = 2 * 12 * shape["layers"] * shape["width"] ** 2 * tokens
    projection = 2 * shape["words"] * shape["width"] * response
    update = 3 * settings["ppo_epochs"]
    return trunk * (4 + update) + projection * (3 + update)


def ppo_table(found) -> str:
    """Seconds for 1,000 episodes by phase, memory, and the share of the ceiling."""
    ceiling = statistics.median(one["rate"] for one in found["ceiling"])
    runs = {"ours": found["ppo"]["ours"]}
    runs |= {name: found["ppo"][name] for name in ("naive", "peers")}
    names = dict(NAMES)
    if "bfloat16" in found["ppo"]:
        runs["bfloat16"] = found["ppo"]["bfloat16"]
        names["bfloat16"] = "notebook, bfloat16 trunk"
    ours = [per_1000(found, run) for run in runs["ours"]]
    rows = []
    for name, some in runs.items():
        totals = [per_1000(found, run) for run in some]
        ratios = [total / own for total, own in zip(totals, ours, strict=True)]
        median = statistics.median(totals)
        share = 1000 * operations(found) / ceiling / median
        seconds = [
            statistics.median(per_1000(found, run, [phase]) for run in some)
            for phase in PHASES
        ]
        rows.append(
            [
                names[name],
                *[f"{one:.1f}" for one in seconds],
                middle(totals),
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(run['memory'] for run in some):.2f}",
                f"{share:.0%}",
            ]
        )
    head = ["seconds per 1,000 episodes", *PHASES, "all (least to most)"]
    head += ["times ours", "peak memory [GiB]", "of the ceiling"]
    settings = found["ppo_settings"]
    shares = {
        key: middle(
            [100 * one[key] / one["update_seconds"] for one in found["ceiling"]]
        )
        for key in ("products_seconds", "products_seconds_ready")
    }
    text = [
        "### PPO\n",
        f"Rollouts of {settings['ppo_rollout_size']} responses of "
        f"{settings['max_new_tokens']} tokens each, {settings['ppo_epochs']} epochs in "
        f"minibatches of {settings['ppo_minibatch_size']}, float32.\n",
        table(head, rows),
        f"\nCeiling: {ceiling / 1e9:,.0f} GFLOP/s, the fastest of three float32 matrix "
        "products. The update's own products, each timed alone, would take "
        f"{shares['products_seconds']} % of the update's time; into memory that is "
        f"ready, {shares['products_seconds_ready']} %.",
    ]
    return "\n".join(text)


def reached(judged, goal):
    """The first measurement at or above the goal, or None."""
    return next((place for place in judged if place["reward"] >= goal), None)


def quality_table(found) -> str:
    """Seconds, episodes and KL until a mean reward was first measured."""
    rows = []
    for goal in GOALS:
        ours = [reached(run["judged"], goal) for run in found["quality"]["ours"]]
        for name, runs in found["quality"].items():
            runs = [run["judged"] for run in runs]
            places = [reached(judged, goal) for judged in runs]
            cells = [f"{goal}, {NAMES[name]}"]
            ends = [
                place or judged[-1] for place, judged in zip(places, runs, strict=True)
            ]
            seconds = [end["seconds"] for end in ends]
            if None in places:
                best = max(place["reward"] for judged in runs for place in judged)
                cells += [f"not in {middle(seconds)}", f"reached {best:.2f}", ""]
            else:
                cells.append(middle(seconds))
                cells += [
                    middle([end[key] for end in ends]) for key in ("episodes", "kl")
                ]
            if None in ours:  # nothing to compare with
                cells.append("")
            else:
                against = [
                    theirs / own["seconds"]
                    for theirs, own in zip(seconds, ours, strict=True)
                ]
                over = "over " if None in places else ""
                cells.append(f"{over}{statistics.median(against):.1f}")
            rows.append(cells)
    head = ["reward reached", "seconds", "episodes", "KL [nats]", "times ours"]
    ratios = " and ".join(
        f"{worst:.0e} in {precision}"
        for precision, (worst,) in found["first_ratio"].items()
    )
    return (
        f"### Time to quality\n\n{table(head, rows)}\n\n"
        f"Largest error of a ratio before the first step, over one rollout: {ratios}."
    )


def supervised_table(found) -> str:
    """Real tokens a second."""
    titles = {"sft": "SFT", "rm": "reward model"}
    rows = []
    for kind, title in titles.items():
        speeds = {
            name: [run["tokens"] / run["seconds"] for run in runs]
            for name, runs in found["supervised"][kind].items()
        }
        for name, some in speeds.items():
            against = [a / b for a, b in zip(speeds["ours"], some, strict=True)]
            memory = [run["memory"] for run in found["supervised"][kind][name]]
            rows.append(
                [
                    f"{title}, {TRAINERS[name]}",
                    middle(some),
                    f"{statistics.median(against):.2f}",
                    f"{statistics.median(memory):.2f}",
                ]
            )
    head = ["", "tokens per second", "ours is faster by", "peak memory [GiB]"]
    return "### SFT and reward model\n\n" + table(head, rows)


def growth_table(found) -> str:
    """Time against episodes and against the size of the rollout."""

    def seconds(run, n):
        """Of the first n rollouts after the one that warmed up."""
        return sum(sum(rollout.values()) for rollout in run["rollouts"][1 : 1 + n])

    runs = {int(size): some for size, some in found["growth"].items()}
    small = min(runs)
    rows = []
    for n in (1, 2, 4, 8):
        times = [seconds(run, n) for run in runs[small]]
        shares = [
            8 * t / n / seconds(run, 8)
            for t, run in zip(times, runs[small], strict=True)
        ]
        peaks = [run["peaks"][n] for run in runs[small]]
        rows.append((n * small, small, times, shares, peaks))
    base = [seconds(run, 4) for run in runs[small]]
    for size, some in runs.items():
        if size != small:
            times = [seconds(run, 4 * small // size) for run in some]
            shares = [t / b for t, b in zip(times, base, strict=True)]
            peaks = [run["memory"] for run in some]
            rows.append((4 * small, size, times, shares, peaks))
    lines = [
        [
            f"{episodes} in rollouts of {size}",
            middle(times),
            f"{statistics.median(shares):.2f}",
            f"{statistics.median(peaks):.2f}",
        ]
        for episodes, size, times, shares, peaks in rows
    ]
    head = ["episodes", "seconds", "1 is in proportion", "peak memory [GiB]"]
    return "### Growth\n\n" + table(head, lines)


def plot_phases(axis, found):
    """Where the time of PPO goes."""
    bottoms = [0.0] * len(NAMES)
    for phase, shade in zip(PHASES, SHADES, strict=True):
        heights = [
            statistics.median(per_1000(found, r, [phase]) for r in found["ppo"][name])
            for name in NAMES
        ]
        axis.bar(
            list(NAMES.values()), heights, bottom=bottoms, color=shade, label=phase
        )
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axis.set(title="PPO: where the time goes", ylabel="seconds per 1,000 episodes")
    axis.legend(frameon=False)


def plot_quality(axis, found):
    """The reward over time, run by run."""
    for name, runs in found["quality"].items():
        for number, run in enumerate(runs):
            x = [place["seconds"] for place in run["judged"]]
            y = [place["reward"] for place in run["judged"]]
            label = NAMES[name] if number == 0 else None
            axis.plot(x, y, color=COLOURS[name], label=label, marker=".", alpha=0.8)
    for goal in GOALS:
        axis.axhline(goal, color="#8a8a8a", linestyle=":", linewidth=1)
    axis.set(title="Time to quality", xlabel="seconds", ylabel="mean held-out reward")
    axis.legend(frameon=False)


def plot_growth(axis, found):
    """Seconds against episodes."""
    size = min(map(int, found["growth"]))
    for number, run in enumerate(found["growth"][str(size)]):
        seconds = [sum(rollout.values()) for rollout in run["rollouts"][1:]]
        x = [size * n for n in range(len(seconds) + 1)]
        label = "notebook" if number == 0 else None
        y = [sum(seconds[:n]) for n in range(len(x))]
        axis.plot(x, y, color=COLOURS["ours"], marker=".", alpha=0.8, label=label)
    axis.set(title="Growth", xlabel="episodes", ylabel="seconds")
    axis.legend(frameon=False)


def plot(found, file):
    """A picture for each part that has one."""
    panels = {"ppo": plot_phases, "quality": plot_quality, "growth": plot_growth}
    panels = [draw for part, draw in panels.items() if part in found]
    if not panels:
        return
    size = (4.6 * len(panels), 3.4)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axis, draw in zip(axes[0], panels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, found)
    figure.savefig(file, dpi=120)


def text_of(found) -> str:
    """All tables that there are numbers for."""
    machine, model = found["machine"], found["model"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    text = [
        f"{where}; torch {machine['torch']}, transformers {machine['transformers']}; a "
        f"model of {model['layers']} layers x {model['width']}, {model['words']:,} "
        "words. Medians of the rounds, and from least to most."
    ]
    tables = {
        "ppo": ppo_table,
        "quality": quality_table,
        "supervised": supervised_table,
        "growth": growth_table,
    }
    text += [make(found) for part, make in tables.items() if part in found]
    return "\n\n".join(text) + "\n"


def write(found, folder) -> str:
    """Write `compare.md` and `compare.png`; returns the text."""
    text = text_of(found)
    (folder / "compare.md").write_text(text)
    plot(found, folder / "compare.png")
    return text
