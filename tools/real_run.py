"""What the preset `full` gives on a real model: `python -m tools.real_run MODEL`.

The series is run once for each seed, notebook by notebook; what is there already is not
run again, so an interrupted command goes on where it was. Figures, seconds and memory
go to `docs/real-run/results.json` and, as a page, to the README beside it, with the
first seed's executed notebooks.
With `HF_HUB_OFFLINE` or `HF_ENDPOINT` set, the data set comes from there.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import torch

from utils.__main__ import parse
from utils.evaluation import FIGURES
from utils.runs import NOTEBOOKS, ROOT, STAGES
from utils.settings import FULL, Settings

FOLDER, RUNS = Path("docs/real-run"), Path("runs/real-run")
NUMBERS = dict(zip(STAGES, "123", strict=True))  # of the notebooks that make them
LOCAL_LINK = re.compile(r"\]\((?!https?:|#)")
OUTPUTS = re.compile(r"^\*The outputs on this page .*\*$", re.M)
PAGE = """# What a real model's run looks like

The preset `full` on a real model of GPT-2's size and on SST-2. Seeds: {seeds}; of
several, the mean, and the least and the most. The notebooks here are the first seed's.

{table}
{curve}
The first update moved the policy by {first} nats per token (`approx_kl`); updates that
ended early: {early}.

{machine}. A seed took {seconds}, in seconds of one processor; peak
memory {peak} GiB. Written by

    {command}
"""
CURVE = """
What more phrases are worth: the first seed's reward model has an accuracy of {}.
"""


def run_measured(command: list[str], environment=None) -> tuple[int, dict]:
    """Its exit status, and what it took: seconds of the processors, memory [GiB].

    Not those of the clock, which also counts what else the machine was doing.
    """
    started = subprocess.Popen(command, cwd=ROOT, env=environment)
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    # of the largest process among its own, in KiB on Linux
    spent = {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20}
    return started.returncode, spent


def measured(stage: str, name: str, seed: int, changes: list[str]) -> tuple[dict, dict]:
    """The metrics of an artefact in the folder of this name, and what it took.

    Its notebook is run unless both are there. Raises SystemExit if that failed, or if
    they are there with other changes.
    """
    made = ROOT / RUNS / name / FULL.preset / stage
    metrics, cost = made / "metrics.json", made.with_name(f"{stage}-cost.json")
    if not (cost.exists() and metrics.exists()):
        command = [sys.executable, "-m", "utils", "--preset", FULL.preset]
        command += ["--only", NUMBERS[stage]]
        for change in (f"runs_dir={RUNS / name}", f"seed={seed}", *changes):
            command += ["--set", change]
        failed, spent = run_measured(command)
        if failed:
            sys.exit(f"seed {seed} stopped in notebook {NUMBERS[stage]}, see above")
        cost.write_text(json.dumps({**spent, "changes": changes}))
    spent = json.loads(cost.read_text())
    if spent["changes"] != changes:
        then = spent["changes"]
        sys.exit(f"{made} was made with {then}; delete {RUNS} to measure {changes}")
    return json.loads(metrics.read_text()), spent


def collect(seeds: list[int], changes: list[str], settings: Settings) -> dict:
    """What the runs of these seeds measure, each figure as a list over the seeds."""
    minibatches = settings.ppo_rollout_size // settings.ppo_minibatch_size
    steps = settings.ppo_epochs * minibatches  # of an update that did not end early
    figures, seconds, peaks, first, early = {}, {}, [], [], []
    for seed in seeds:
        for stage in STAGES:
            metrics, cost = measured(stage, str(seed), seed, changes)
            for when in ("before", "after"):
                for name, value in metrics.get(when, {}).items():
                    figures.setdefault(name, {}).setdefault(when, []).append(value)
            seconds.setdefault(stage, []).append(round(cost["seconds"]))
            peaks.append(cost["peak_gib"])
        history = metrics["history"]  # of PPO, the last one
        first.append(history[0]["approx_kl"])
        early.append(sum(row["optimizer_steps"] < steps for row in history))
    torch_version = torch.__version__.split("+")[0]
    return {
        "seeds": seeds,
        "changes": changes,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
        f"PyTorch {torch_version}",
        "seconds": seconds,
        "peak_gib": round(max(peaks), 1),
        "first_approx_kl": first,
        "ended_early": early,
        "figures": figures,
    }


def learning_curve(rows: list[str], seed: int, changes: list[str]) -> dict:
    """The reward model's accuracy by the number of phrases that it learns from."""
    found = {}
    for n in rows:
        own = [one for one in changes if not one.startswith("train_rows=")]
        own = [*own, f"train_rows={n}"]
        metrics, _ = measured("reward_model", f"{seed}-{n}", seed, own)
        found[n] = metrics["after"]["accuracy"]
    return found


def mean(values: list[float], spec: str) -> str:
    """The mean over the seeds."""
    return format(statistics.fmean(values), spec)


def spread(values: list[float], spec: str) -> str:
    """The mean over the seeds, and the least and the most."""
    low, high = format(min(values), spec), format(max(values), spec)
    middle = mean(values, spec)
    return middle if low == high else f"{middle} ({low} to {high})"


def command_of(found: dict) -> str:
    """The command that measured this."""
    seeds, (model, *changes) = len(found["seeds"]), found["changes"]
    command = f"python -m tools.real_run {model.partition('=')[2]} --seeds {seeds}"
    if found["curve"]:
        command += f" --curve {','.join(found['curve'])}"
    return " --set ".join([command, *changes])


def page(found: dict) -> str:
    """What `collect` found, as a page of Markdown."""
    lines = ["| | before | after |", "|---|---:|---:|"]
    for name, (description, spec) in FIGURES.items():
        if each := found["figures"].get(name):
            old = spread(each["before"], spec) if "before" in each else ""
            lines.append(f"| {description} | {old} | {spread(each['after'], spec)} |")
    curve = [
        f"{share:.1%} from {f'{int(n):,}' if int(n) else 'all'}"
        for n, share in found["curve"].items()
    ]
    times = [f"{spread(found['seconds'][x], ',.0f')} for {x}" for x in STAGES]
    return PAGE.format(
        table="\n".join(lines),
        seeds=len(found["seeds"]),
        command=command_of(found),
        machine=found["machine"],
        seconds=", ".join(times).replace("_", " "),
        peak=found["peak_gib"],
        first=spread(found["first_approx_kl"], ".3f"),
        early=sum(found["ended_early"]),
        curve=CURVE.format(", ".join(curve)) if curve else "",
    )


def as_shown(notebook, command: str):
    """An executed notebook as it stands in docs/real-run.

    Its links lead from there to the same places, its first cell says what it is, and
    no warning names a folder of the machine that it ran on.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LOCAL_LINK.sub("](../../", cell.source)
        else:
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    title = notebook.cells[0]
    title.source = OUTPUTS.sub(f"*A real model's run, by `{command}`.*", title.source)
    return notebook


def settings_of(changes: list[str]) -> Settings:
    """The settings of a run with these changes, as `python -m utils` checks them."""
    sets = [word for change in changes for word in ("--set", change)]
    made, _ = parse(["--preset", FULL.preset, "--only", "1", *sets])
    ((_, settings),) = made.values()
    return settings


def main(argv=None):
    """Run what is missing, and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tools.real_run")
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 42 on")
    how = {"default": "", "metavar": "ROWS,..."}
    how["help"] = "train the first seed's reward model on so many phrases, too"
    parser.add_argument("--curve", **how)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"a run takes one seed at least, got --seeds {options.seeds}")
    changes = [f"model_name={options.model}", *options.set]
    curve = list(filter(None, options.curve.split(",")))
    for n in curve:
        settings_of([f"train_rows={n}"])
    settings = settings_of(changes)
    fields = {change.partition("=")[0] for change in changes}
    if own := {"seed", "runs_dir"} & fields:
        parser.error(f"--set cannot change {own.pop()}, which this command sets")
    seeds = [FULL.seed + i for i in range(options.seeds)]
    found = collect(seeds, changes, settings)
    found["curve"] = learning_curve(curve, seeds[0], changes)
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "README.md").write_text(page(found), "utf8")
    for number in NUMBERS.values():
        name = NOTEBOOKS[number]
        executed = ROOT / RUNS / str(seeds[0]) / FULL.preset / name
        notebook = as_shown(nbformat.read(executed, 4), command_of(found))
        (folder / name).write_text(nbformat.writes(notebook) + "\n", "utf8")
    print(f"{FOLDER}: README.md, results.json, and the notebooks of seed {seeds[0]}")


if __name__ == "__main__":
    main()
