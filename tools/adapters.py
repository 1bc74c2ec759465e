"""PPO with adapters in the tiny world: `python -m tools.adapters`.

The layouts are those of `more/7-Adapters.ipynb`, which shows what this command
measures. A small search chooses the learning rate of the policy's adapter; then come
three seeds of the one-base layout at each rank, and of the two other layouts. It takes
the SFT model and the reward model of `runs/tiny`, trains the two reward adapters, and
writes `docs/adapters.json`. Full fine-tuning, to compare with, is PPO in
`docs/race.json`.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

from tools.race import by_seed, rounded
from utils.evaluation import gain_in_objective
from utils.settings import TINY
from utils.support.artefacts import find_artefacts, write_text
from utils.support.notebook import LOOP, ROOT, import_cells
from utils.support.preflight import prepare

RESULTS = "docs/adapters.json"
LESSON = "more/7-Adapters.ipynb"
RATES, SEARCH_SEED, SEEDS = (5e-4, 1e-3), 100, range(3)
# (layout, rank), the one that is searched first
RACED = ((2, 16), (2, 1), (2, 4), (3, 16), (1, 16))
MODELS = ("load", "prompts", "prompts-of", "score", "score-function")
CELLS = ("reward-adapter", "reward-on", "build", "score-by")
CELLS += ("fresh-adapter-run", "train-in")


def lessons() -> tuple[SimpleNamespace, SimpleNamespace]:
    """Functions and models of notebook 3, and the layouts of notebook 7."""
    settings, device = prepare("policy", TINY.preset)
    names = {"settings": settings, "device": device}
    cells = (*MODELS, *LOOP, "judges", "evaluate")
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *cells, names=names))
    seven = import_cells(LESSON, *CELLS, names={**names, "lesson3": three})
    return three, SimpleNamespace(**seven)


def measure(three, seven, layout, rank, seed, rate) -> dict:
    """The figures of one run, as notebook 3's own models and judges see it."""
    own = dataclasses.replace(three.settings, seed=seed, ppo_lr=rate)
    run, *_ = seven.train_in(layout, rank, own)
    figures, _ = three.evaluate(run.policy, show_progress=False)
    figures |= gain_in_objective(
        figures["score"], figures["kl"], three.possible, own.kl_coef
    )
    return {**figures, "seconds": run.seconds}


def main(argv=None):
    """Train the reward adapters, search, run, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.adapters",
        description="PPO with adapters in the tiny world: layouts and ranks.",
    )
    parser.parse_args(argv)
    find_artefacts(TINY, "sft", "reward_model")
    torch.set_num_threads(1)
    bar = tqdm(total=2 + len(RATES) + len(RACED) * len(SEEDS), file=sys.stderr)
    with contextlib.redirect_stdout(io.StringIO()):  # the lessons' own bars
        write_text(ROOT / RESULTS, json.dumps(rounded(found(bar))) + "\n")


def found(bar) -> dict:
    """All that is measured, with a step of the bar for each run."""
    three, seven = lessons()
    settings = three.settings
    bases = {
        "on-the-pretrained": settings.model_name,
        "on-the-sft-model": three.sft_folder,
    }
    accuracy = {}
    for name, base in bases.items():
        accuracy[name] = seven.train_reward_adapter(base, seven.ADAPTERS / name)
        bar.update()
    three.possible = three.reference_scores(three.held_out, settings.possible_samples)
    search = {}
    for rate in RATES:
        search[rate] = measure(three, seven, *RACED[0], SEARCH_SEED, rate)["share"]
        bar.update()
    rate, layouts = max(search, key=search.get), {}
    for layout, rank in RACED:
        runs = []
        for seed in SEEDS:
            runs.append(measure(three, seven, layout, rank, seed, rate))
            bar.update()
        layouts[f"layout {layout}, rank {rank}"] = by_seed(runs)
    return {
        "rate": rate,
        "search": {f"{rate:g}": share for rate, share in search.items()},
        "reward accuracy": accuracy,
        "layouts": layouts,
    }


if __name__ == "__main__":
    main()
