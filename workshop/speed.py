"""How fast is PPO? Ours beside two other loops, on the same work, as one table."""

import copy
import dataclasses
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import nbformat
import torch
from IPython.core.interactiveshell import InteractiveShell
from transformers import AutoConfig

from more.common import peak_memory
from practice import tiny_world
from practice.cells import import_cells
from utils.settings import NOTEBOOKS, ROOT, STAGES
from utils.training import get_device, trunk_dtype
from workshop import loops
from workshop.work import Watch, Work, build_model

PHASES = ("generate", "score", "log-probs", "update")
MODEL = "runs/tiny/speed"  # the default
TRL = "TRL 1.12.0"
# The other loops have no bound on an update, and all are to take the same steps. The
# first rollout warms up, the second is timed
SAME = {"max_approx_kl": 0, "max_new_tokens": 15, "precision": "float32"}
SAME |= {"ppo_rollout_size": 64, "ppo_episodes": 128}
CHANGES = (f"model_name={MODEL}", f"dataset_name={tiny_world.WORLD}/dataset")
CHANGES += tuple(f"{name}={value}" for name, value in SAME.items())


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


def place(machine: dict) -> str:
    """Where it was measured: the GPU, else the processor."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"


def spread(values: list[float]) -> str:
    """The median, and the least and the most if they differ."""
    low, middle, high = (f"{f(values):,.1f}" for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(found: dict) -> str:
    """What was measured, as Markdown."""
    machine, model, settings = found["machine"], found["model"], found["settings"]
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
        row += [spread(totals[name])]
        row += [f"{statistics.median(x):.2f}" for x in (ratios, one["memory"])]
        rows.append([*row, f"{least / statistics.median(totals[name]):.0%}"])
    if TRL not in found["loops"]:
        rows.append([TRL, "not installed", *[""] * (len(head) - 2)])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""{place(machine)}; torch {machine["torch"]}, transformers \
{machine["transformers"]}; a model of {model["layers"]} layers x {model["width"]}, \
{model["words"]:,} words. Rollouts of {settings["ppo_rollout_size"]} responses of \
{settings["max_new_tokens"]} tokens each, {settings["ppo_epochs"]} epochs in \
minibatches of {settings["ppo_minibatch_size"]}, float32. Medians of {found["seeds"]} \
(and from least to most); the ceiling is {rate / 1e9:,.0f} GFLOP/s. Commit \
{found["commit"]}.

{lines}
"""


def compare(runs, half: str) -> dict:
    """PPO in each of the loops that are installed, and the ceiling; they take turns."""
    if runs.processes > 1:
        sys.exit("two loops at once would slow each other; leave out --processes")
    ways = {"notebook": (timed, "ours"), "naive loop": (timed, "naive")}
    ways |= {TRL: (timed, "trl")} if find_spec("trl") else {}
    ways |= {"ceiling": (ceiling,), f"notebook, {half} trunk": (timed, "ours", half)}
    found = runs("speed", ways)
    config = AutoConfig.from_pretrained(runs.settings.model_name)
    sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size
    return {
        "settings": dataclasses.asdict(runs.settings),
        "model": dict(zip(("layers", "width", "words"), sizes, strict=True)),
        "ceiling": found.pop("ceiling")["rate"],
        "loops": found,
    }


def speed(runs) -> dict:
    """The loops, and their table for docs/speed.md."""
    if find_spec("trl") is None:
        sys.exit("trl is missing; pip install -r workshop/speed-requirements.txt")
    if runs.settings.model_name == MODEL and not Path(MODEL).exists():
        tiny_world.build_world(ROOT / tiny_world.WORLD)
        build_model(ROOT / MODEL)
    print(table(runs.head | (result := compare(runs, "bfloat16"))))
    return result


def clocked(names: dict) -> Watch:
    """A watch in the names that notebook 3 has before PPO's loop; it counts waits."""
    watch, pause = Watch(names["device"]), names["pause"]
    loops.clock(names, watch)
    names["score"] = watch.timed("score", names["score"])

    def paused(step):  # to look at texts and curves is no part of PPO's time
        watch.rollout_done()
        pause(step)
        watch.switch("log-probs")
        watch.phases.clear()

    def heard(message, *_, **__):
        watch.phases[f"{watch.phase} waits"] += "synchronizing" in str(message)

    names["pause"] = paused
    if watch.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        warnings.filterwarnings("always", "called a synchronizing")
        warnings.showwarning = heard
    return watch


def stage(settings, seed, number, place) -> dict:
    """All cells of notebook 1, 2 or 3: its figures, and what it took.

    That is seconds of the clock, and the peak memory of this process, on a GPU of its
    tensors [GiB]. Of PPO's loop also seconds by phase, how often a rollout waited for a
    GPU, the largest |log ρ| before a weight has moved, and float16's loss scale.
    """
    folder, name = Path(place) / str(seed), NOTEBOOKS[number]
    # A run that goes on after an interrupt would look quick
    (folder / settings.preset / "ppo.pt").unlink(missing_ok=True)
    cells = nbformat.read(ROOT / name, as_version=4).cells
    _, *ids = [cell.id for cell in cells if cell.cell_type == "code"]
    names = {"PRESET": settings.preset, "USE_DRIVE": False}
    names["CHANGES"] = settings.changes | {"runs_dir": str(folder), "seed": seed}
    InteractiveShell.instance()  # a cell that shows a picture asks for it
    started, at = time.perf_counter(), ids.index("loop") if number == "3" else len(ids)
    names = import_cells(name, *ids[:at], names=names)
    watch = clocked(names) if number == "3" else None
    names = import_cells(name, *ids[at:], names=names)
    found = {"seconds": time.perf_counter() - started}
    found["peak_gib"] = peak_memory(names["device"])
    metrics = json.loads((names["folder"] / "metrics.json").read_text())
    found |= {when: metrics[when] for when in ("before", "after")}
    if watch:
        _, *rollouts = watch.rollouts  # the first ended before the loop began
        total, steps = sum(rollouts, Counter()), names["steps"] * len(rollouts)
        found["phases"] = {x: total[x] for x in PHASES}
        found["waits"] = {x: total[f"{x} waits"] / len(rollouts) for x in PHASES}
        found["first_ratio_off"] = names["off"]["ratio"].item()
        found["loss_scale"] = names["run"].optimizer.scaler.state_dict().get("scale")
        taken = sum(row["optimizer_steps"] for row in metrics["history"])
        found["steps_left_out"] = steps - taken
    return found


def gpu(runs) -> dict:
    """Three loops of PPO on the same 64 episodes, and notebooks 1 to 3 as they are."""
    beside, settings, stages = copy.copy(runs), runs.settings, {}
    beside.settings = dataclasses.replace(settings, **SAME)
    half = str(trunk_dtype(settings, get_device(settings))).removeprefix("torch.")
    compared = compare(beside, half)
    for number, name in zip("123", STAGES, strict=True):
        way = {name: (stage, number, str(runs.folder))}
        stages |= runs("notebooks", way, [settings.seed])
    phases, after = (stages["policy"][x] for x in ("phases", "after"))
    total = sum(map(sum, phases.values()))
    figures = {
        "minutes": sum(x["seconds"][0] for x in stages.values()) / 60,
        "GiB at most": max(x["peak_gib"][0] for x in stages.values()),
        "sampling's share of PPO": phases["generate"][0] / total,
    }
    named = {"reward": "reward", "kl": "KL", "share": "share of the best possible"}
    figures |= {named[x]: after[x][0] for x in named if x in after}
    said = f"{place(runs.head['machine'])}, {settings.model_name} in {half}: "
    said += ", ".join(f"{name} {x:,.2f}" for name, x in figures.items())
    print(f"For README.md:\n\nA GPU: {said} ([more](docs/speed.md#on-a-gpu)).\n")
    print(f"For docs/speed.md:\n\n{said}. PPO's loop beside others:\n")
    print(table(runs.head | compared))
    print("Please send both in by pull request, with docs/gpu.json.\n")
    return {"precision": half, "stages": stages, "beside": compared}
