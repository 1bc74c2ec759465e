"""What the preset `full` gives on a real model: `python -m tools.real_run MODEL`.

The series is run once for each seed, notebook by notebook; what is there already is not
run again, so an interrupted command goes on where it was. Figures, seconds and memory
go to `docs/real-run/results.json` and, as a page, to the README beside it, with the
first seed's executed notebooks.
With `HF_HUB_OFFLINE` or `HF_ENDPOINT` set, the data set comes from there.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import torch

from utils.evaluation import FIGURES
from utils.settings import FULL, Settings, parse_field
from utils.support.artefacts import STAGES, notebook_of, write_text
from utils.support.notebook import NOTEBOOKS, ROOT
from utils.support.run import EARLIER_FIGURES

FOLDER, RUNS = Path("docs/real-run"), Path("runs/real-run")
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


def run_measured(command: list[str], environment: dict) -> tuple[int, dict]:
    """Its exit status, and what it took: seconds of the processors, memory [GiB].

    Not those of the clock, which also counts what else the machine was doing.
    """
    started = subprocess.Popen(command, cwd=ROOT, env=environment)
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    # of the largest process among its own, in KiB on Linux
    return started.returncode, {
        "seconds": seconds,
        "peak_gib": usage.ru_maxrss / 2**20,
    }


def run_notebook(
    artefact: str, seed: int, changes: list[str], threads: int = 0, name: str = ""
):
    """Run the notebook that makes an artefact, unless it is there with its cost.

    On so many threads; 0: as many as there are. In a folder of this name, or the
    seed's.

    Raises SystemExit if it failed, or if it is there with other changes.
    """
    runs = RUNS / (name or str(seed))
    made = ROOT / runs / FULL.preset / artefact
    cost = made.with_name(f"{artefact}-cost.json")
    if cost.exists() and (made / "metrics.json").exists():
        then = json.loads(cost.read_text())["changes"]
        if then != changes:
            sys.exit(f"{made} was made with {then}; delete {RUNS} to measure {changes}")
        return
    sets = [f"runs_dir={runs}", f"seed={seed}", *changes]
    command = [sys.executable, "-m", "utils", "--preset", FULL.preset]
    command += ["--only", notebook_of(artefact)]
    command += [word for one in sets for word in ("--set", one)]
    ours = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    failed, spent = run_measured(command, {**os.environ, **ours})
    if failed:
        sys.exit(f"seed {seed} stopped in notebook {notebook_of(artefact)}, see above")
    write_text(cost, json.dumps({**spent, "changes": changes}))


def collect(seeds: list[int], changes: list[str], settings: Settings) -> dict:
    """What the runs of these seeds measured, each figure as a list over the seeds."""
    minibatches = settings.ppo_rollout_size // settings.ppo_minibatch_size
    steps = settings.ppo_epochs * minibatches  # of an update that did not end early
    folders = [ROOT / RUNS / str(seed) / FULL.preset for seed in seeds]
    figures, seconds, peaks, first, early = {}, {}, [], [], []
    for folder in folders:
        for artefact in STAGES:
            metrics = json.loads((folder / artefact / "metrics.json").read_text())
            for when in ("before", "after"):
                for name, value in metrics.get(when, {}).items():
                    figures.setdefault(name, {}).setdefault(when, []).append(value)
            cost = json.loads((folder / f"{artefact}-cost.json").read_text())
            seconds.setdefault(artefact, []).append(round(cost["seconds"]))
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


def learning_curve(rows: list[int], seed: int, changes: list[str], threads: int = 0):
    """The reward model's accuracy by the number of phrases that it learnt from."""
    found = {}
    for n in rows:
        own = [one for one in changes if not one.startswith("train_rows=")]
        own, name = [*own, f"train_rows={n}"], f"{seed}-{n}"
        run_notebook("reward_model", seed, own, threads, name)
        folder = ROOT / RUNS / name / FULL.preset / "reward_model"
        metrics = json.loads((folder / "metrics.json").read_text())
        found[str(n)] = metrics["after"]["accuracy"]
    return found


def mean(values: list[float], spec: str) -> str:
    """The mean over the seeds."""
    return format(sum(values) / len(values), spec)


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
    for name, (description, spec) in {**EARLIER_FIGURES, **FIGURES}.items():
        if each := found["figures"].get(name):
            old = spread(each["before"], spec) if "before" in each else ""
            lines.append(f"| {description} | {old} | {spread(each['after'], spec)} |")
    curve = [
        f"{share:.1%} from {f'{int(n):,}' if int(n) else 'all'}"
        for n, share in found["curve"].items()
    ]
    times = [f"{spread(found['seconds'][a], ',.0f')} for {a}" for a in STAGES]
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


def main(argv=None):
    """Run what is missing, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.real_run",
        description="Run the preset full on a real model, over several seeds.",
    )
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 42 on")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at once, which share the cores"
    )
    parser.add_argument(
        "--curve",
        default="",
        metavar="ROWS,...",
        help="train the first seed's reward model on so many phrases, too",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"a run takes one seed at least, got --seeds {options.seeds}")
    if options.jobs < 1:
        parser.error(f"one seed at once is the least, got --jobs {options.jobs}")
    changes = [f"model_name={options.model}", *options.changes]
    try:
        curve = [
            parse_field("train_rows", n) for n in filter(None, options.curve.split(","))
        ]
        for n in curve:
            dataclasses.replace(FULL, train_rows=n)
        pairs = [change.partition("=")[::2] for change in changes]
        given = {field: parse_field(field, value) for field, value in pairs}
        if own := {"seed", "runs_dir"} & set(given):
            raise ValueError(
                f"--set cannot change {own.pop()}, which this command sets"
            )
        settings = dataclasses.replace(FULL, **given)
    except ValueError as error:
        parser.error(str(error))
    seeds = [FULL.seed + i for i in range(options.seeds)]
    threads = max(1, os.cpu_count() // options.jobs) if options.jobs > 1 else 0

    def run_seed(seed):
        for artefact in STAGES:
            run_notebook(artefact, seed, changes, threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run_seed, seeds))
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    found = collect(seeds, changes, settings)
    found["curve"] = learning_curve(curve, seeds[0], changes, threads)
    write_text(ROOT / FOLDER / "results.json", json.dumps(found, indent=2) + "\n")
    write_text(ROOT / FOLDER / "README.md", page(found))
    for name in map(notebook_of, STAGES):
        executed = ROOT / RUNS / str(seeds[0]) / FULL.preset / NOTEBOOKS[name]
        notebook = as_shown(nbformat.read(executed, 4), command_of(found))
        text = nbformat.writes(notebook) + "\n"
        write_text(ROOT / FOLDER / NOTEBOOKS[name], text)
    print(f"{FOLDER}: README.md, results.json, and the notebooks of seed {seeds[0]}")


if __name__ == "__main__":
    main()
