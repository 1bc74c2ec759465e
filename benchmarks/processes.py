"""One process and two, a thread each: `python -m benchmarks.processes`.

Seconds of notebook 3's loop per episode, as `python -m utils --processes N` takes them
in the tiny preset, in turns. Needs the models of notebooks 1 and 2 in `runs/tiny`, and
a machine with nothing else to do. Writes `docs/processes.json`.
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
from utils.settings import TINY
from utils.support.artefacts import find_artefacts, write_text
from utils.support.notebook import ROOT

RESULTS = "docs/processes.json"
SIZES = {64: 10, 512: 4}  # responses in a minibatch, of four in a rollout: rollouts


def seconds_per_episode(n: int, size: int) -> float:
    """Of a run of PPO on n processes, from the models of `runs/tiny`."""
    episodes = SIZES[size] * 4 * size
    changes = {"device": "cpu", "ppo_episodes": episodes, "ppo_rollout_size": 4 * size}
    changes |= {"ppo_minibatch_size": size, "ppo_micro_batch_size": size}
    changes |= {"possible_samples": 2, "time_machine_prompts": 0}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sft", "reward_model"):
            shutil.copytree(ROOT / TINY.folder / name, Path(folder) / "tiny" / name)
        command = [sys.executable, "-m", "utils", "--only", "3", "--processes", str(n)]
        for name, value in {**changes, "runs_dir": folder}.items():
            command += ["--set", f"{name}={value}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        metrics = json.loads((Path(folder) / "tiny" / "metrics.json").read_text())
    return metrics["policy"]["seconds"] / episodes


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
        result[f"minibatches of {size}"] = {
            "seconds per episode": found,
            "times as fast": one / two,
        }
    write_text(ROOT / RESULTS, json.dumps(result, indent=2) + "\n")
    for name, measured in list(result.items())[1:]:
        print(f"{name}: two are {measured['times as fast']:.2f} times as fast as one")


if __name__ == "__main__":
    main()
