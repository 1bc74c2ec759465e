"""REINFORCE, RLOO, GRPO and PPO in the tiny world: `python -m tools.race`.

The estimators are those of `more/4-Estimators.ipynb`, which shows what this command
measures. A small search chooses learning rate and group size of each; then come five
seeds of each, GRPO on the grammar as reward, and the exact worlds. It takes the SFT
model and the reward model of `runs/tiny`, and writes `docs/race.json`.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import torch
from tqdm import tqdm

from utils.evaluation import gain_in_objective
from utils.practice import exact_world
from utils.settings import TINY
from utils.support.artefacts import find_artefacts, write_text
from utils.support.notebook import LOOP, ROOT, import_cells
from utils.support.preflight import prepare

RESULTS = "docs/race.json"
LESSON = "more/4-Estimators.ipynb"
NAMES = ("REINFORCE", "RLOO", "GRPO", "PPO")
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
GROUPS = {"RLOO": (4, 16), "GRPO": (4, 16)}
SEARCH_SEED, SEEDS = 100, range(5)
WORLDS, BETAS = range(5), (0.25, 0.5, 1.0)
MODELS = ("load", "prompts", "prompts-of", "score", "score-function")
# Of the fifteen responses, to the one prompt of an exact world
EXACT_GROUP = 4


def silent():
    """Let a worker say nothing: its lesson's bars would tear the one of all runs."""
    sys.stdout = io.StringIO()


def lessons(settings, device) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The functions and models of notebook 3, and the estimators of notebook 4."""
    names = {"settings": settings, "device": device}
    cells = (*MODELS, *LOOP, "judges", "evaluate")
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *cells, names=names))
    names |= {"lesson3": three, "series": three}
    cells = ("whole-response", "grpo-policy-loss", "ways", "in-groups", "train-as")
    cells += ("grammar-score",)
    return three, SimpleNamespace(**import_cells(LESSON, *cells, names=names))


def race(name, k, rate, seed, reward="reward model") -> dict:
    """The figures of one run in the tiny world, and its curves."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    silent()
    settings, device = prepare("policy", TINY.preset)
    three, four = lessons(settings, device)
    own = dataclasses.replace(settings, seed=seed, ppo_lr=rate)
    score = {"reward model": three.score, "grammar": four.grammar_score}[reward]
    started = (
        time.process_time()
    )  # on one thread, so that a busy machine tells the same
    run = four.train_as(name, k, score, own)
    seconds = time.process_time() - started
    figures, _ = three.evaluate(run.policy, show_progress=False)
    scores = three.reference_scores(three.held_out, settings.possible_samples)
    means = figures["score"], figures["kl"]
    figures |= gain_in_objective(*means, scores, settings.kl_coef)
    # KiB on Linux; this process has done nothing else
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    curves = {key: [row[key] for row in run.history] for key in ("score", "kl")}
    return {**figures, "seconds": seconds, "peak_gib": peak, "curves": curves}


def exact(name, world, beta) -> float:
    """What one run reaches in an exact world, of what there is to gain."""
    torch.set_num_threads(1)
    silent()
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *LOOP))
    cells = ("whole-response", "grpo-policy-loss", "ways", "train-exactly")
    names = {"lesson3": three, "exact_world": exact_world}
    four = SimpleNamespace(**import_cells(LESSON, *cells, names=names))
    advantages, loss, own = four.ways(EXACT_GROUP)[name]
    small = exact_world.ExactWorld(world)
    lm = four.train_exactly(small, beta, advantages, loss, **own).lm
    return small.reached(lm, beta)


def in_parallel(jobs: int, title: str, tasks: dict) -> dict:
    """The result of each (function, *arguments), every one in a fresh process."""
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, start, max_tasks_per_child=1) as pool:
        found = {key: pool.submit(*task) for key, task in tasks.items()}
        return {key: one.result() for key, one in tqdm(found.items(), title)}


def by_seed(results: list[dict]) -> dict:
    """Each figure as a list over the seeds, without the curves."""
    return {key: [one[key] for one in results] for key in results[0] if key != "curves"}


def main(argv=None):
    """Search, race, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.race",
        description="Race four estimators of the policy gradient in the tiny world.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"one run at once is the least, got --jobs {options.jobs}")
    find_artefacts(TINY, "sft", "reward_model")
    jobs = options.jobs
    search = in_parallel(
        jobs,
        "search",
        {
            (name, k, rate): (race, name, k, rate, SEARCH_SEED)
            for name in NAMES
            for k in GROUPS.get(name, (1,))
            for rate in RATES
        },
    )
    share = {key: found["share"] for key, found in search.items()}
    chosen = {
        name: max((key for key in share if key[0] == name), key=share.get)[1:]
        for name in NAMES
    }
    tasks = {
        (name, reward, seed): (race, name, *chosen[name], seed, reward)
        for name, reward in [*((n, "reward model") for n in NAMES), ("GRPO", "grammar")]
        for seed in SEEDS
    }
    found = in_parallel(jobs, "race", tasks)
    tasks = {
        (name, beta, world): (exact, name, world, beta)
        for name in NAMES
        for beta in BETAS
        for world in WORLDS
    }
    reached = in_parallel(jobs, "exact worlds", tasks)

    def of(name, reward="reward model"):
        return [found[name, reward, seed] for seed in SEEDS]

    results = {
        "chosen": chosen,
        "search": {
            f"{name}, groups of {k}, learning rate {rate:g}": x
            for (name, k, rate), x in share.items()
        },
        "race": {name: by_seed(of(name)) for name in NAMES},
        "curves": {
            name: {
                key: [one["curves"][key] for one in of(name)] for key in ("score", "kl")
            }
            for name in NAMES
        },
        "grammar": by_seed(of("GRPO", "grammar")),
        "exact": {
            name: {str(b): [reached[name, b, w] for w in WORLDS] for b in BETAS}
            for name in NAMES
        },
    }
    write_text(ROOT / RESULTS, json.dumps(rounded(results)) + "\n")
    print(f"{RESULTS}: {chosen}")


def rounded(x):
    """The same with four significant digits: the rest is rounding."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
