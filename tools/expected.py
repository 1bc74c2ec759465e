"""What the tiny preset measures, over several seeds: `python -m tools.expected`.

The command runs the series once for each seed, a few minutes each, and writes mean and
standard deviation of every figure to `utils/support/expected.json`. Every run of the
preset then shows its own figures beside mean +- 4 standard deviations.

Each seed also pre-trains a tiny GPT-2 of its own. Another processor rounds otherwise,
so the model that it builds for the tiny world is another one, too.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from utils.data import load_tokenizer
from utils.practice import tiny_world
from utils.settings import TINY
from utils.support import expected
from utils.support.notebook import ROOT

FIRST_SEED = 1000  # of the pre-training


# torch has one stream of random numbers for all threads
ONE_AT_A_TIME = threading.Lock()


def measure(seed: int, keep: bool, threads: int = 0) -> dict:
    """The figures after training of a run with this seed; 0 threads: as many as are."""
    runs = Path("runs/expected") / str(seed)
    metrics = ROOT / runs / TINY.preset / "metrics.json"
    if not (keep and metrics.exists()):
        with ONE_AT_A_TIME:
            world = tiny_world.build_world(ROOT / tiny_world.WORLD)
            tokenizer = load_tokenizer(str(world / "model"))
            tokenizer.save_pretrained(ROOT / runs / "model")
            lm = tiny_world.pretrain(tokenizer, seed=FIRST_SEED + seed)
            lm.save_pretrained(ROOT / runs / "model")
        changes = {"seed": seed, "runs_dir": runs, "model_name": runs / "model"}
        sets = [x for item in changes.items() for x in ("--set", "{}={}".format(*item))]
        command = [sys.executable, "-m", "utils", "--preset", TINY.preset, *sets]
        ours = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
        ours |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        done = subprocess.run(
            command, cwd=ROOT, env=ours, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"seed {seed} failed:\n{done.stderr[-3000:]}")
    found = json.loads(metrics.read_text())
    return {name: x for part in found.values() for name, x in part["after"].items()}


def main(argv=None):
    """Run every seed, and write what to expect."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.expected",
        description="Measure the figures of the tiny preset over several seeds.",
    )
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    parser.add_argument(
        "--keep", action="store_true", help="do not run seeds again that are there"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at once, which share the cores"
    )
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"one seed at once is the least, got --jobs {options.jobs}")
    if options.seeds < 2:
        parser.error(f"a spread takes 2 seeds or more, got --seeds {options.seeds}")
    threads = max(1, os.cpu_count() // options.jobs) if options.jobs > 1 else 0
    if threads:
        torch.set_num_threads(threads)
    seeds, same = range(options.seeds), itertools.repeat
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(measure, seeds, same(options.keep), same(threads))
        runs = list(tqdm(found, total=options.seeds))
    figures = {
        name: (statistics.mean(values), statistics.stdev(values))
        for name in runs[0]
        for values in [[run[name] for run in runs]]
    }
    settings = TINY.that_change("figures")
    found = {"seeds": len(runs), "settings": settings, "figures": figures}
    expected.FILE.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{expected.FILE}: {len(figures)} figures over {len(runs)} seeds")


if __name__ == "__main__":
    main()
