"""One process and two, a thread each: `python -m benchmarks.processes`.

Seconds of PPO per episode, as `python -m more.processes` takes them in the tiny preset,
in turns. Needs the models of notebooks 1 and 2 in `runs/tiny`, and a machine with
nothing else to do. Writes `docs/processes.json`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import machine
from more.common import write_text
from utils.runs import ROOT, find_artefacts
from utils.settings import TINY

RESULTS = "docs/processes.json"
SIZES = {64: 10, 512: 4}  # responses in a minibatch, of four in a rollout: rollouts


def seconds_per_episode(n: int, size: int) -> float:
    """Of a run of PPO on n processes, from the models of `runs/tiny`."""
    sizes = {"ppo_rollout_size": 4 * size, "ppo_episodes": SIZES[size] * 4 * size}
    sizes |= {"ppo_minibatch_size": size, "ppo_micro_batch_size": size}
    # Else they would be sought in the other folder of runs
    changes = {"model_name": TINY.model_name, "dataset_name": TINY.dataset_name}
    with tempfile.TemporaryDirectory() as runs:
        changes |= {**sizes, "device": "cpu", "runs_dir": runs}
        for name in ("sft", "reward_model"):
            shutil.copytree(ROOT / TINY.folder / name, Path(runs) / "tiny" / name)
        command = [sys.executable, "-m", "more.processes", "--processes", str(n)]
        for name, value in changes.items():
            command += ["--set", f"{name}={value}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        file = Path(runs) / "tiny" / "policy_processes" / "metrics.json"
        return json.loads(file.read_text())["seconds"] / sizes["ppo_episodes"]


def main(argv=None):
    """Measure in turns; write each number, and the ratio of the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    find_artefacts(TINY, "sft", "reward_model")
    result = {"machine": machine()}
    for size in SIZES:
        found = {"1": [], "2": []}
        for _ in range(options.rounds):
            for n, times in found.items():
                times.append(seconds_per_episode(int(n), size))
        one, two = map(statistics.median, found.values())
        measured = {"seconds per episode": found, "times as fast": one / two}
        result[f"minibatches of {size}"] = measured
        print(f"minibatches of {size}: two are {one / two:.2f} times as fast as one")
    write_text(ROOT / RESULTS, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
