"""PPO with adapters in the tiny world: `python -m tools.adapters`.

The layouts are those of `more/7-Adapters.ipynb`, which shows what this command
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
# The better of 1e-3 and 2e-3 on seed 100, layout 3, rank 16: J 0.54 against 0.51
RATE, SEEDS = 2e-3, range(3)
RACED = ((3, 16), (2, 16), (3, 1), (3, 4), (1, 16))  # layout and rank
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
    three.possible = three.reference_scores(three.held_out, settings.possible_samples)
    return three, SimpleNamespace(**seven)


def measure(three, seven, layout, rank, seed) -> dict:
    """The figures of one run, as notebook 3's own models and judges see it."""
    own = dataclasses.replace(three.settings, seed=seed, ppo_lr=RATE)
    run, *_ = seven.train_in(layout, rank, own)
    figures, _ = three.evaluate(run.policy, show_progress=False)
    means = figures["score"], figures["kl"]
    figures |= gain_in_objective(*means, three.possible, own.kl_coef)
    return {**figures, "seconds": run.seconds}


def reward_adapters(three, seven) -> dict:
    """How often each reward adapter is right; trained and saved as notebook 7 does."""
    bases = {
        "on-the-sft-model": three.sft_folder,
        "on-the-pretrained": three.settings.model_name,
    }
    return {
        name: seven.train_reward_adapter(base, seven.ADAPTERS / name)
        for name, base in bases.items()
    }


def name_of(layout, rank) -> str:
    """What a row of the results is called."""
    return f"layout {layout}, rank {rank}"


def measure_all(found: dict, write, bar):
    """Add to `found` what is not in it yet; `write()` after each run."""
    three, seven = lessons()
    if "reward accuracy" not in found:
        found["reward accuracy"] = reward_adapters(three, seven)
    bar.update()
    found["rate"] = RATE
    layouts = found.setdefault("layouts", {})
    for layout, rank in RACED:
        runs = layouts.setdefault(name_of(layout, rank), {})
        for i, seed in enumerate(SEEDS):
            if len(runs.get("score", ())) == i:
                one = measure(three, seven, layout, rank, seed)
                for figure, values in by_seed([one]).items():
                    runs.setdefault(figure, []).extend(values)
                write()
            bar.update()


def main(argv=None):
    """Train the reward adapters, search, run, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.adapters",
        description="PPO with adapters in the tiny world: layouts and ranks.",
    )
    parser.parse_args(argv)
    find_artefacts(TINY, "sft", "reward_model")
    torch.set_num_threads(1)
    path = ROOT / RESULTS
    found = json.loads(path.read_text("utf8")) if path.exists() else {}
    total = 1 + len(RACED) * len(SEEDS)
    with (
        tqdm(total=total, file=sys.stderr) as bar,
        contextlib.redirect_stdout(io.StringIO()),  # the lessons' own bars
    ):
        measure_all(found, lambda: write_text(path, json.dumps(rounded(found))), bar)
    write_text(path, json.dumps(rounded(found)) + "\n")


if __name__ == "__main__":
    main()
