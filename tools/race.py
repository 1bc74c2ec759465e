"""REINFORCE, RLOO, GRPO and PPO in the tiny world: `python -m tools.race`.

The estimators are those of `more/5-Estimators.ipynb`, which shows what this command
measures. A small search chooses learning rate and group size of each; then come five
seeds of each, GRPO on the grammar as reward, and the exact worlds. It takes the SFT
model and the reward model of `runs/tiny`, and writes `docs/race.json`.
"""

import argparse
import io
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import torch
from tqdm import tqdm

from more.common import gain_in_objective, notebook_3, peak_memory, write_text
from practice import exact_world
from practice.cells import LOOP, import_cells
from utils.runs import NOTEBOOKS, ROOT, find_artefacts, prepare
from utils.settings import TINY

RESULTS = "docs/race.json"
NAMES = ("REINFORCE", "RLOO", "GRPO", "PPO")
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
GROUPS = {"RLOO": (4, 16), "GRPO": (4, 16)}
SEARCH_SEED, SEEDS = 100, range(5)
WORLDS, BETAS = range(5), (0.25, 0.5, 1.0)
EXACT_GROUP = 4  # of the fifteen responses, to the one prompt of an exact world
METHODS = ("whole-response", "grpo-policy-loss", "ways")


def alone():
    """Let a worker take one core and say nothing: its bars would tear that of all."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()


def lessons(settings, device) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The functions and models of notebook 3, and the estimators of notebook 5."""
    three = notebook_3(settings, device)
    names = {"device": device, "lesson3": three, "series": three}
    cells = (*METHODS, "in-groups", "train-as", "grammar-score")
    return three, SimpleNamespace(**import_cells(NOTEBOOKS["5"], *cells, names=names))


def race(name, k, rate, seed, reward="reward model") -> dict:
    """The figures of one run in the tiny world, and its curves."""
    alone()
    torch.manual_seed(seed)
    settings, device = prepare("policy", TINY.preset)
    three, five = lessons(settings, device)
    own = replace(settings, seed=seed, ppo_lr=rate)
    score = {"reward model": three.score, "grammar": five.grammar_score}[reward]
    started = time.process_time()  # on one core, so that a busy machine tells the same
    run = five.train_as(name, k, score, own)
    seconds = time.process_time() - started
    figures, _ = three.evaluate(run.policy, show_progress=False)
    scores = three.reference_scores(three.held_out, settings.possible_samples)
    means = figures["score"], figures["kl"]
    figures |= gain_in_objective(*means, scores, settings.kl_coef)
    figures |= {"seconds": seconds, "peak_gib": peak_memory(device)}
    curves = {key: [row[key] for row in run.history] for key in ("score", "kl")}
    return {**figures, "curves": curves}


def exact(name, world, beta) -> float:
    """What one run reaches in an exact world, of what there is to gain."""
    alone()
    three = SimpleNamespace(**import_cells(NOTEBOOKS["3"], *LOOP))
    names = {"lesson3": three, "exact_world": exact_world}
    five = import_cells(NOTEBOOKS["5"], *METHODS, "train-exactly", names=names)
    advantages, update, own = five["ways"](EXACT_GROUP)[name]
    small = exact_world.ExactWorld(world)
    policy = five["train_exactly"](small, beta, advantages, update, **own)
    return small.reached(policy.lm, beta)


def options_of(argv, tool: str, description: str, **more):
    """The command line of a measurement in the tiny world, whose models must be there.

    `more` are options beside `--jobs`, by name. Raises SystemExit if one is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tools.{tool}", description=description
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"one run at once is the least, got --jobs {options.jobs}")
    find_artefacts(TINY, "sft", "reward_model")
    return options


def in_parallel(jobs: int, title: str, tasks: dict) -> dict:
    """The result of each (function, *arguments), every one in a fresh process."""
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, start, max_tasks_per_child=1) as pool:
        found = {key: pool.submit(*task) for key, task in tasks.items()}
        return {key: one.result() for key, one in tqdm(found.items(), title)}


def by_seed(results: list):
    """Of the same nested dictionaries for each seed, one with a list over the seeds."""
    if not isinstance(results[0], dict):
        return results
    return {name: by_seed([one[name] for one in results]) for name in results[0]}


def rounded(x):
    """The same with four significant digits: the rest is rounding."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def main(argv=None):
    """Search, race, and write what was measured."""
    description = "Race four estimators of the policy gradient in the tiny world."
    jobs = options_of(argv, "race", description).jobs
    tried = {
        (name, k, rate): (race, name, k, rate, SEARCH_SEED)
        for name in NAMES
        for k in GROUPS.get(name, (1,))
        for rate in RATES
    }
    search = in_parallel(jobs, "search", tried)
    share = {key: found["share"] for key, found in search.items()}
    chosen = {
        name: max((key for key in share if key[0] == name), key=share.get)[1:]
        for name in NAMES
    }
    rewards = [*((name, "reward model") for name in NAMES), ("GRPO", "grammar")]
    tasks = {
        (name, reward, seed): (race, name, *chosen[name], seed, reward)
        for name, reward in rewards
        for seed in SEEDS
    }
    found = in_parallel(jobs, "race", tasks)
    found = {one: by_seed([found[*one, seed] for seed in SEEDS]) for one in rewards}
    curves = {one: figures.pop("curves") for one, figures in found.items()}
    tasks = {
        (name, beta, world): (exact, name, world, beta)
        for name in NAMES
        for beta in BETAS
        for world in WORLDS
    }
    reached = in_parallel(jobs, "exact worlds", tasks)
    results = {
        "chosen": chosen,
        "search": {
            f"{name}, groups of {k}, learning rate {rate:g}": x
            for (name, k, rate), x in share.items()
        },
        "race": {name: found[name, "reward model"] for name in NAMES},
        "curves": {name: curves[name, "reward model"] for name in NAMES},
        "grammar": found["GRPO", "grammar"],
        "exact": {
            name: {str(b): [reached[name, b, w] for w in WORLDS] for b in BETAS}
            for name in NAMES
        },
    }
    write_text(ROOT / RESULTS, json.dumps(rounded(results)) + "\n")
    print(f"{RESULTS}: {chosen}")


if __name__ == "__main__":
    main()
