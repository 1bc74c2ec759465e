"""What the tiny preset measures, over several seeds: `python -m utils.support.bands`.

The command runs the series once for each seed, a few minutes each, and writes mean and
standard deviation of every figure to `bands.json` beside this file. Every run of the
preset then shows its own figures beside mean +- 4 standard deviations.

Each seed also pre-trains a tiny GPT-2 of its own. Another processor rounds otherwise,
so the model that it builds for the tiny world is another one, too.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from utils.data import load_tokenizer
from utils.settings import TINY
from utils.support import toy
from utils.support.notebook import ROOT

FIRST_SEED = 1000  # of the pre-training
FILE = Path(__file__).with_name("bands.json")
# What leaves the figures as they are
FREE = ("seed", "runs_dir", "time_machine_prompts", "frontier_rollouts", "best_of_n")
FREE += ("checkpoint_every",)


def fixed(settings) -> dict:
    """The settings on which the figures depend."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if name not in FREE}


def expected(settings) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each figure after training, by its name.

    Empty if the bands do not apply: with other settings, and on a GPU (they were
    measured on a CPU, in float32).
    """
    bands = json.loads(FILE.read_text())
    if fixed(settings) != bands["settings"] or torch.cuda.is_available():
        return {}
    return {name: tuple(band) for name, band in bands["figures"].items()}


def measure(seed: int, keep: bool) -> dict:
    """The figures after training of a run with this seed."""
    runs = Path("runs/bands") / str(seed)
    metrics = ROOT / runs / TINY.preset / "metrics.json"
    if not (keep and metrics.exists()):
        world = toy.build_world(ROOT / toy.WORLD)
        tokenizer = load_tokenizer(str(world / "model"))
        tokenizer.save_pretrained(ROOT / runs / "model")
        lm = toy.pretrain(tokenizer, seed=FIRST_SEED + seed)
        lm.save_pretrained(ROOT / runs / "model")
        changes = {"seed": seed, "runs_dir": runs, "model_name": runs / "model"}
        changes["frontier_rollouts"] = 0
        sets = [x for item in changes.items() for x in ("--set", "{}={}".format(*item))]
        command = [sys.executable, "-m", "utils", "--preset", TINY.preset, *sets]
        ours = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
        done = subprocess.run(
            command, cwd=ROOT, env=ours, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"seed {seed} failed:\n{done.stderr[-3000:]}")
    found = json.loads(metrics.read_text())
    return {name: x for part in found.values() for name, x in part["after"].items()}


def main(argv=None):
    """Run every seed, and write the bands."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.support.bands",
        description="Measure the figures of the tiny preset over several seeds.",
    )
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    parser.add_argument(
        "--keep", action="store_true", help="do not run seeds again that are there"
    )
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error(f"a spread takes 2 seeds or more, got --seeds {options.seeds}")
    runs = [measure(seed, options.keep) for seed in tqdm(range(options.seeds))]
    figures = {
        name: (statistics.mean(values), statistics.stdev(values))
        for name in runs[0]
        for values in [[run[name] for run in runs]]
    }
    bands = {"seeds": len(runs), "settings": fixed(TINY), "figures": figures}
    FILE.write_text(json.dumps(bands, indent=2) + "\n")
    print(f"{FILE.relative_to(ROOT)}: {len(figures)} figures over {len(runs)} seeds")


if __name__ == "__main__":
    main()
