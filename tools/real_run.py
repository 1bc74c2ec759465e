"""What the preset `full` gives on a real model: `python -m tools.real_run MODEL`.

The series is run once for each seed, notebook by notebook; what is there already is not
run again, so an interrupted command goes on where it was. Figures, seconds and memory
go to `docs/real-run/results.json`, and the first seed's executed notebooks beside it.
With `HF_HUB_OFFLINE` or `HF_ENDPOINT` set, the data set comes from there.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils.settings import FULL, Settings, parse_field
from utils.support.artefacts import STAGES, notebook_of, write_text
from utils.support.notebook import NOTEBOOKS, ROOT

FOLDER, RUNS = Path("docs/real-run"), Path("runs/real-run")


def run_notebook(artefact: str, seed: int, changes: list[str]):
    """Run the notebook that makes an artefact, unless it is there with its cost.

    Raises SystemExit if it failed, or if it is there with other changes.
    """
    made = ROOT / RUNS / str(seed) / FULL.preset / artefact
    cost = made.with_name(f"{artefact}-cost.json")
    if cost.exists() and (made / "metrics.json").exists():
        then = json.loads(cost.read_text())["changes"]
        if then != changes:
            sys.exit(f"{made} was made with {then}; delete {RUNS} to measure {changes}")
        return
    sets = [f"runs_dir={RUNS / str(seed)}", f"seed={seed}", *changes]
    command = [sys.executable, "-m", "utils", "--preset", FULL.preset]
    command += ["--only", notebook_of(artefact)]
    command += [word for one in sets for word in ("--set", one)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit(f"seed {seed} stopped in notebook {notebook_of(artefact)}, see above")
    # The largest process that has ended, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    spent = {"seconds": time.perf_counter() - started, "peak_gib": peak / 2**20}
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


def main(argv=None):
    """Run what is missing, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.real_run",
        description="Run the preset full on a real model, over several seeds.",
    )
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 42 on")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"a run takes one seed at least, got --seeds {options.seeds}")
    changes = [f"model_name={options.model}", *options.changes]
    try:
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
    for seed in seeds:
        for artefact in STAGES:
            run_notebook(artefact, seed, changes)
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    found = collect(seeds, changes, settings)
    write_text(ROOT / FOLDER / "results.json", json.dumps(found, indent=2) + "\n")
    for name in map(notebook_of, STAGES):
        executed = ROOT / RUNS / str(seeds[0]) / FULL.preset / NOTEBOOKS[name]
        shutil.copy(executed, ROOT / FOLDER / NOTEBOOKS[name])
    print(f"{FOLDER}: results.json, and the notebooks of seed {seeds[0]}")


if __name__ == "__main__":
    main()
