"""Shaped rewards beside PPO's own, in both worlds: `python -m tools.shaping`.

The method is that of `more/4-Estimators.ipynb`, which shows what this command measures:
as many episodes as notebook 3 takes, from the same models. In the tiny world five seeds
on the models of `runs/tiny`; on a real model the seeds that `tools.real_run` has run,
each beside its own PPO. Every run is a process of one thread. What is there is not
done again, and a run that was interrupted goes on from its checkpoint. The figures go
to `docs/shaping.json`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

from tools.race import LESSON, MODELS, by_seed, rounded
from tools.real_adapters import settings_of, train_checked
from utils.evaluation import gain_in_objective
from utils.models import load_causal_lm
from utils.settings import FULL, TINY, Settings, check_choice
from utils.support.artefacts import find_artefacts, write_text
from utils.support.notebook import LOOP, ROOT, import_cells
from utils.support.preflight import prepare
from utils.training import seed_everything

RESULTS, OURS = "docs/shaping.json", Path("runs/shaping")
TINY_SEEDS = range(5)
WAYS = ("PPO", "shaped")


def settings_for(preset: str, seed: int, way: str) -> tuple[Settings, dict]:
    """Those of a run, and of the models that it starts from as changes by name."""
    if preset == "tiny":
        models, theirs = {}, dataclasses.replace(TINY, seed=seed)
    else:
        theirs, _ = settings_of(seed, {})
        models = dataclasses.asdict(theirs)
        models.pop("preset")
    folder = {"runs_dir": str(OURS / way / str(seed)), "checkpoint_every": 2}
    return dataclasses.replace(theirs, **folder), models


def measure(preset: str, seed: int, way: str):
    """Train, and write the figures, the texts and the history beside them."""
    check_choice("way", way, WAYS)
    torch.set_num_threads(1)
    ours, models = settings_for(preset, seed, way)
    theirs, device = prepare("policy", preset, models)
    names = {"settings": theirs, "device": device}
    cells = (*MODELS, *LOOP, "judges", "evaluate")
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *cells, names=names))
    names |= {"lesson3": three, "series": three, "settings": ours}
    cells = ("scores-so-far", "shaped")
    four = SimpleNamespace(**import_cells(LESSON, *cells, names=names))
    advantages = three.ppo_advantages
    if way == "shaped":
        advantages = four.shaped(three.score, three.eos_id)

    seed_everything(ours.seed)
    run = three.fresh_run(load_causal_lm(three.sft_folder, device), ours)
    train_checked(three, run, ours, advantages, three.reward_folder, (four.shaped,))
    figures, rows = three.evaluate(run.policy)
    possible = three.reference_scores(three.held_out, ours.possible_samples)
    means = figures["score"], figures["kl"]
    figures |= gain_in_objective(*means, possible, ours.kl_coef)
    found = {"figures": figures, "history": run.history, "seconds": run.seconds}
    found["rows"] = rows
    write_text(ours.folder / "found.json", json.dumps(found))


def collect(preset: str, seeds: range, way: str) -> dict:
    """Figures, seconds and curves of these seeds, each as a list over the seeds."""
    found = []
    for seed in seeds:
        ours, _ = settings_for(preset, seed, way)
        found.append(json.loads((ROOT / ours.folder / "found.json").read_text()))
    return {
        "figures": by_seed([one["figures"] for one in found]),
        **records_of(found, ours),
    }


def records_of(runs: list[dict], settings: Settings) -> dict:
    """What several runs wrote down: seconds of the loop, curves, and how it moved."""
    histories = [run["history"] for run in runs]
    minibatches = settings.ppo_rollout_size // settings.ppo_minibatch_size
    steps = settings.ppo_epochs * minibatches
    early = [sum(row["optimizer_steps"] < steps for row in h) for h in histories]
    curves = {
        name: [[row[name] for row in h] for h in histories] for name in ("score", "kl")
    }
    first = [history[0]["approx_kl"] for history in histories]
    return {
        "loop_seconds": [run["seconds"] for run in runs],
        "first_approx_kl": first,
        "ended_early": early,
        "curves": curves,
    }


def collect_ppo(seeds: range) -> dict:
    """What `tools.real_run` found with PPO as it is, in the form of `collect`."""
    found = []
    for seed in seeds:
        theirs, _ = settings_of(seed, {})
        place = ROOT / theirs.folder
        found.append(json.loads((place / "policy/metrics.json").read_text()))
    return {
        "before": by_seed([one["before"] for one in found]),
        "figures": by_seed([one["after"] for one in found]),
        **records_of(found, theirs),
    }


def main(argv=None):
    """Do what is missing, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.shaping",
        description="PPO with shaped rewards, in the tiny world and on a real model.",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many of tools.real_run's, from 42 on"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    one = {"nargs": 3, "metavar": ("PRESET", "SEED", "WAY")}
    parser.add_argument("--one", **one, help="this run only, in this process")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"one run at once is the least, got --jobs {options.jobs}")
    if options.seeds < 2:
        parser.error(f"a spread takes 2 seeds or more, got --seeds {options.seeds}")
    if options.one:
        preset, seed, way = options.one
        measure(preset, int(seed), way)
        return
    real = range(FULL.seed, FULL.seed + options.seeds)
    runs = {("full", "shaped"): real}
    runs |= {("tiny", way): TINY_SEEDS for way in WAYS}
    try:
        find_artefacts(TINY, "sft", "reward_model")
        tasks = [
            (preset, seed, way, settings_for(preset, seed, way)[0].folder)
            for (preset, way), seeds in runs.items()
            for seed in seeds
        ]
    except FileNotFoundError as error:
        parser.error(str(error))

    def run(preset, seed, way, folder):
        if (ROOT / folder / "found.json").exists():
            return
        command = [sys.executable, "-m", "tools.shaping", "--one", preset, str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run([*command, way], cwd=ROOT, env=environment).returncode:
            sys.exit(f"{preset}, seed {seed}, {way} stopped, see above")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda task: run(*task), tasks))
    found = {
        "tiny": {way: collect("tiny", TINY_SEEDS, way) for way in WAYS},
        "real": {"PPO": collect_ppo(real), "shaped": collect("full", real, "shaped")},
    }
    write_text(ROOT / RESULTS, json.dumps(rounded(found)) + "\n")
    shares = found["real"]["shaped"]["figures"]["share"]
    listed = ", ".join(f"{share:.1%}" for share in shares)
    print(f"{RESULTS}: {listed} of the best possible gain on a real model")


if __name__ == "__main__":
    main()
