"""PPO with adapters in the tiny world: `python -m tools.adapters`.

The layouts are those of `more/8-Adapters.ipynb`, which shows what this command
measures: three seeds of each rank and layout. It takes the SFT model and the reward
model of `runs/tiny`, trains the reward adapters, and writes `docs/adapters.json` after
each run; what stands there is not run again (delete the file to begin anew). Full
fine-tuning, to compare with, is PPO in `docs/race.json`.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import sys
from types import SimpleNamespace

from tqdm import tqdm

from more.common import gain_in_objective, notebook_3, write_text
from practice.cells import import_cells
from tools.race import rounded
from utils.runs import ROOT, prepare
from utils.settings import TINY

RESULTS = "docs/adapters.json"
LESSON = "more/8-Adapters.ipynb"
# The better of 1e-3 and 2e-3 on seed 100, layout 3, rank 16: J 0.54 against 0.51
RATE, SEEDS = 2e-3, range(3)
RACED = ((3, 16), (2, 16), (3, 1), (3, 4), (1, 16))  # layout and rank
CELLS = ("reward-adapter", "reward-train", "reward-on", "build", "score-by")
CELLS += ("fresh-adapter-run", "train-in")


def lessons() -> tuple[SimpleNamespace, SimpleNamespace]:
    """Functions and models of notebook 3, and the layouts of notebook 8."""
    settings, device = prepare("policy", TINY.preset)
    three = notebook_3(settings, device)
    three.possible = three.reference_scores(three.held_out, settings.possible_samples)
    names = {"settings": settings, "device": device, "lesson3": three}
    names |= {"sft_folder": three.sft_folder, "ROLLOUTS": 1}
    return three, SimpleNamespace(**import_cells(LESSON, *CELLS, names=names))


def measure(three, eight, layout, rank, seed) -> dict:
    """The figures of one run, as notebook 3's own models and judges see it."""
    own = dataclasses.replace(three.settings, seed=seed, ppo_lr=RATE)
    run, *_ = eight.train_in(layout, rank, own)
    figures, _ = three.evaluate(run.policy, show_progress=False)
    means = figures["score"], figures["kl"]
    figures |= gain_in_objective(*means, three.possible, own.kl_coef)
    return {**figures, "seconds": run.seconds}


def main(argv=None):
    """Train the reward adapters, run what is missing, and write what was measured."""
    argparse.ArgumentParser(
        prog="python -m tools.adapters",
        description="PPO with adapters in the tiny world: layouts and ranks.",
    ).parse_args(argv)
    path = ROOT / RESULTS
    found = json.loads(path.read_text("utf8")) if path.exists() else {}
    with contextlib.redirect_stdout(io.StringIO()):  # the lessons' own bars
        three, eight = lessons()
        found |= {"rate": RATE, "reward accuracy": eight.accuracies}
        layouts = found.setdefault("layouts", {})
        todo = [(*way, i) for way in RACED for i in range(len(SEEDS))]
        for layout, rank, i in tqdm(todo, file=sys.stderr):
            runs = layouts.setdefault(f"layout {layout}, rank {rank}", {})
            if len(runs.get("score", ())) == i:
                for figure, x in measure(three, eight, layout, rank, SEEDS[i]).items():
                    runs.setdefault(figure, []).append(x)
                write_text(path, json.dumps(rounded(found)) + "\n")


if __name__ == "__main__":
    main()
