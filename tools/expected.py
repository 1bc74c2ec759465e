"""What the tiny preset measures, over several seeds: `python -m tools.expected`.

The series is run once for each seed, two seeds at once with a thread each, and mean and
standard deviation of every figure go to `utils/expected.json`. Every run of the preset
then shows its own figures beside mean +- 4 standard deviations. What is in
`runs/expected` is not run again, so an interrupted command goes on where it was; after
an edit of the lessons or of `utils` all begins anew, in another folder.

Each seed also pre-trains a tiny GPT-2 of its own. Another processor rounds otherwise,
so the model that it builds for the tiny world is another one, too.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from tqdm import tqdm

from practice import tiny_world
from utils.data import load_tokenizer
from utils.runs import NOTEBOOKS, ROOT, STAGES, fingerprint
from utils.settings import TINY

FILE = ROOT / "utils" / "expected.json"
FIRST_SEED = 1000  # of the pre-training


def folder_of_runs() -> Path:
    """A folder that has another name after an edit of what the figures come from."""
    files = [*sorted((ROOT / "utils").glob("*.py")), ROOT / "practice/tiny_world.py"]
    code = [file.read_text("utf8") for file in files]
    for number in "123":
        cells = nbformat.read(ROOT / NOTEBOOKS[number], as_version=4).cells
        code += [cell.source for cell in cells if cell.cell_type == "code"]
    return ROOT / "runs" / "expected" / fingerprint(code)


def make_world(folder: Path, seed: int):
    """The tiny world with another model, unless it is there."""
    if folder.exists():
        return
    beside = folder.with_name("world.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(tiny_world.build_world(ROOT / tiny_world.WORLD), beside)
    tokenizer = load_tokenizer(beside / "model")
    model = tiny_world.pretrain(tokenizer, show_progress=False, seed=FIRST_SEED + seed)
    model.save_pretrained(beside / "model")
    beside.rename(folder)


def measure(runs: Path, seed: int) -> dict:
    """The figures after training of the run with this seed in `runs/<seed>`.

    Raises RuntimeError, with its last words, if it fails.
    """
    folder = runs / str(seed) / TINY.preset
    make_world(folder / "world", seed)
    files = {n: folder / x / "metrics.json" for n, x in zip("123", STAGES, strict=True)}
    missing = [number for number, file in files.items() if not file.exists()]
    if missing:
        command = [sys.executable, "-m", "utils", "--preset", TINY.preset]
        command += ["--only", ",".join(missing), "--set", f"seed={seed}"]
        command += ["--set", f"runs_dir={folder.parent}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"seed {seed} failed:\n{done.stderr[-3000:]}")
    found = [json.loads(file.read_text())["after"] for file in files.values()]
    return {name: x for figures in found for name, x in figures.items()}


def main(argv=None):
    """Run every seed, and write what to expect."""
    parser = argparse.ArgumentParser(prog="python -m tools.expected")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    n = parser.parse_args(argv).seeds
    if n < 2:
        parser.error(f"a spread takes 2 seeds or more, got --seeds {n}")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    spawn = multiprocessing.get_context("spawn")  # torch reads these when it starts
    with ProcessPoolExecutor(max_workers=2, mp_context=spawn) as pool:
        found = pool.map(measure, [folder_of_runs()] * n, range(n))
        runs = list(tqdm(found, desc="Seeds", total=n))
    figures = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        figures[name] = statistics.mean(values), statistics.stdev(values)
    command = f"python -m tools.expected --seeds {n}"
    found = {"command": command, "seeds": n, "figures": figures}
    FILE.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{FILE}: {len(figures)} figures over {n} seeds")


if __name__ == "__main__":
    main()
