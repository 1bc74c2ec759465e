"""How fast is PPO? Ours beside two other loops, on the same work, as one table."""

import dataclasses
import importlib.util
import re
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from more.common import peak_memory
from practice import tiny_world
from utils.runs import ROOT
from utils.training import get_device
from workshop import loops
from workshop.series import spread
from workshop.work import Watch, Work, build_model

PHASES = ("generate", "score", "log-probs", "update")
MODEL = "runs/tiny/speed"  # the default
# The other loops have no bound on an update, and all are to take the same steps. The
# first rollout warms up, the second is timed
CHANGES = (f"model_name={MODEL}", f"dataset_name={tiny_world.WORLD}/dataset")
CHANGES += ("max_approx_kl=0", "max_new_tokens=15", "precision=float32")
CHANGES += ("ppo_rollout_size=64", "ppo_episodes=128")


def timed(settings, seed, loop, precision="float32") -> dict:
    """Seconds for 1,000 episodes of a loop by phase, and its peak memory [GiB].

    The first rollout does not count.
    """
    work = Work(dataclasses.replace(settings, precision=precision), seed)
    watch = Watch(work.device)
    getattr(loops, loop)(work, watch)
    n, later = settings.ppo_rollout_size, watch.rollouts[1:]
    found = {x: 1000 * sum(r[x] for r in later) / (n * len(later)) for x in PHASES}
    episodes = n * len(watch.rollouts)
    return {**found, "memory": peak_memory(work.device), "episodes": episodes}


def ceiling(settings, seed) -> dict:
    """Operations a second of the fastest of three float32 matrix products."""
    config = AutoConfig.from_pretrained(settings.model_name)
    words, width = config.vocab_size, config.hidden_size
    device, rates = get_device(settings), []
    for n, m, k in ((2048,) * 3, (words, 960, width), (960, 1024, width)):
        a, b = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
        out, watch, times = torch.empty(n, m, device=device), Watch(device), []
        for _ in range(6):
            started = watch.now()
            torch.mm(a, b, out=out)
            times.append(watch.now() - started)
        rates.append(2 * n * m * k / statistics.median(times[1:]))
    return {"rate": max(rates)}


def operations(model: dict, settings: dict) -> float:
    """What PPO has to compute for one episode, whoever does it.

    A multiplication and an addition for each weight: the trunk for all tokens, the
    projection for those of the response; once to sample, once for the reference, once
    for the old policy, once (without projection) for the reward, and three times
    (forward, and backward twice) in each epoch of the update.
    """
    response = settings["max_new_tokens"]
    # a prompt has 2 or more
    tokens = (2 + settings["prompt_max_tokens"]) / 2 + response
    trunk = 2 * 12 * model["layers"] * model["width"] ** 2 * tokens
    projection = 2 * model["words"] * model["width"] * response
    update = 3 * settings["ppo_epochs"]
    return trunk * (4 + update) + projection * (3 + update)


def table(found: dict) -> str:
    """What was measured, as Markdown."""
    machine, model, settings = found["machine"], found["model"], found["settings"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    rate = statistics.median(found["ceiling"])
    least = 1000 * operations(model, settings) / rate  # seconds
    totals = {
        name: [sum(x) for x in zip(*(one[phase] for phase in PHASES), strict=True)]
        for name, one in found["loops"].items()
    }
    ours = next(iter(totals.values()))
    head = ["seconds per 1,000 episodes", *PHASES, "all (least to most)"]
    head += ["times ours", "peak memory [GiB]", "of the ceiling"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, one in found["loops"].items():
        ratios = [x / own for x, own in zip(totals[name], ours, strict=True)]
        row = [name, *(f"{statistics.median(one[phase]):.1f}" for phase in PHASES)]
        row.append(spread(totals[name], ",.1f", statistics.median))
        row += [f"{statistics.median(x):.2f}" for x in (ratios, one["memory"])]
        rows.append([*row, f"{least / statistics.median(totals[name]):.0%}"])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""{where}; torch {machine["torch"]}, transformers \
{machine["transformers"]}; a model of {model["layers"]} layers x {model["width"]}, \
{model["words"]:,} words. Rollouts of {settings["ppo_rollout_size"]} responses of \
{settings["max_new_tokens"]} tokens each, {settings["ppo_epochs"]} epochs in \
minibatches of {settings["ppo_minibatch_size"]}, float32. Medians of {found["seeds"]} \
(and from least to most); the ceiling is {rate / 1e9:,.0f} GFLOP/s. Commit \
{found["commit"]}.

{lines}
"""


def with_table(page: str, name: str, found: dict) -> str:
    """The page with this table between `<!-- name -->` and the next `<!-- end -->`."""
    place = f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    return re.sub(place, lambda x: x[1] + table(found) + x[2], page, flags=re.S)


def speed(runs) -> dict:
    """PPO in each of the loops, and the ceiling; they take turns."""
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is missing; pip install -r workshop/speed-requirements.txt")
    if runs.processes > 1:
        sys.exit("two loops at once would slow each other; leave out --processes")
    model = runs.settings.model_name
    if model == MODEL and not Path(model).exists():
        tiny_world.build_world(ROOT / tiny_world.WORLD)
        build_model(ROOT / MODEL)
    ways = {"notebook": (timed, "ours"), "naive loop": (timed, "naive")}
    ways |= {"TRL 1.12.0": (timed, "trl"), "ceiling": (ceiling,)}
    ways["notebook, bfloat16 trunk"] = timed, "ours", "bfloat16"
    found, config = runs("speed", ways), AutoConfig.from_pretrained(model)
    sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size
    result = {
        "model": dict(zip(("layers", "width", "words"), sizes, strict=True)),
        "ceiling": found.pop("ceiling")["rate"],
        "loops": found,
    }
    page, name = ROOT / "docs/speed.md", f"docs/{runs.output.name}"
    text = with_table(page.read_text("utf8"), name, runs.head | result)
    page.write_text(text, "utf8")
    return result
