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
SHADES = ("#9ec3ea", "#f0b9a8", "#d0d0d0", "#3b6fb6")  # of the phases


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
    response = settings["max_new_tokens"]
    tokens = (
        2 + settings["prompt_max_tokens"]
    ) / 2 + response  # a prompt has 2 or more
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


def plot(found):
    """Where the time of PPO goes."""
    figure, axis = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
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
    return figure


def text_of(found) -> str:
    """All tables that there are numbers for."""
    machine, model = found["machine"], found["model"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    text = [
        f"{where}; torch {machine['torch']}, transformers {machine['transformers']}; a "
        f"model of {model['layers']} layers x {model['width']}, {model['words']:,} "
        "words. Medians of the rounds, and from least to most."
    ]
    tables = {"ppo": ppo_table, "supervised": supervised_table}
    text += [make(found) for part, make in tables.items() if part in found]
    return "\n\n".join(text) + "\n"


def write(found, folder) -> str:
    """Write `compare.md` and `compare.png`; returns the text."""
    text = text_of(found)
    (folder / "compare.md").write_text(text)
    if "ppo" in found:
        plot(found).savefig(folder / "compare.png", dpi=120)
    return text
