"""Learning from pairs, over several seeds: `python -m tools.preferences`.

What `more/5-Preferences.ipynb` shows beside its own run: the learning curve of the
reward model on pairs in the tiny world, three seeds, and notebook 3's whole run of PPO
on the last of each; and DPO in five exact worlds, with PPO beside it. The functions are
the notebook's. It takes the SFT model and the reward model of `runs/tiny`, and writes
`docs/preferences.json`.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from types import SimpleNamespace

import torch

from tools.race import MODELS, in_parallel, rounded, silent
from utils.models import freeze
from utils.practice import exact_world
from utils.preferences import agreement_with_labeller, split_by_prompt
from utils.settings import TINY
from utils.support.artefacts import find_artefacts, write_text
from utils.support.notebook import LOOP, ROOT, import_cells
from utils.support.preflight import prepare

RESULTS = "docs/preferences.json"
LESSON = "more/5-Preferences.ipynb"
SIZES, SEEDS = (50, 200, 1_000, 5_000), range(3)
WORLDS = range(5)
EXACT_BETAS, EXACT_BETA = (0.25, 0.5, 1.0), 0.5
# Pairs, and of PPO about as many responses (two to a pair) in rollouts of
SAMPLED = ((500, 1_024, 64), (5_000, 9_984, 256))
# The share of the pairs to measure on: 95 % of what can be had is then known to a point
MEASURED_ON = 0.45
FUNCTIONS = ("sample-pairs", "utility", "label", "both-texts", "train-on-pairs")
FUNCTIONS += ("ppo-on",)
FIGURES = ("exactly_positive", "exactly_grammatical", "kl", "reward", "distinct_2")


def lesson() -> SimpleNamespace:
    """The functions of the lesson, with the models of notebook 3."""
    torch.set_num_threads(1)
    silent()
    settings, device = prepare("policy", TINY.preset)
    names = {"settings": settings, "device": device}
    cells = (*MODELS, *LOOP, "judges", "evaluate")
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *cells, names=names))
    names |= {"lesson3": three, "tokenizer": three.tokenizer, "eos_id": three.eos_id}
    return SimpleNamespace(**import_cells(LESSON, *FUNCTIONS, names=names))


def pairs_of(five, seed) -> tuple[list[dict], list[dict]]:
    """Pairs to learn from and to measure on, sampled and labelled with this seed."""
    pairs = five.sample_pairs(five.lesson3.reference, five.lesson3.train_prompts, seed)
    train, test = split_by_prompt(five.label(pairs, seed), MEASURED_ON, seed)
    return train[: SIZES[-1]], test


def curve(seed) -> dict:
    """One seed: agreement with the labeller on new prompts, by the number of pairs.

    And the figures of PPO on the reward model that learnt from the most.
    """
    five = lesson()
    train, test = pairs_of(five, seed)
    texts = five.both_texts(test)
    utilities = five.utility(texts).view(-1, 2)

    def agreement(model):
        scores = five.score_texts(model, texts).view(-1, 2)
        return agreement_with_labeller(utilities, scores)

    labels, ceiling = agreement(five.lesson3.reward_model)
    found = {"labels": labels, "ceiling": ceiling, "agreement": {}}
    for size in SIZES:
        model, _ = five.train_on_pairs(train[:size], seed)
        found["agreement"][str(size)] = agreement(model)[0]
    own = dataclasses.replace(five.settings, seed=seed)
    run = five.ppo_on(freeze(model), own)
    figures, _ = five.lesson3.evaluate(run.policy, show_progress=False)
    return {**found, "ppo": {name: figures[name] for name in FIGURES}}


def exact(seed) -> dict[str, dict[str, float]]:
    """What DPO reaches in an exact world, and PPO with as many responses: by price."""
    torch.set_num_threads(1)
    silent()
    five = SimpleNamespace(**import_cells(LESSON, "exact-pairs", "exact-some-pairs"))
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *LOOP))
    names = {"lesson3": three, "exact_world": exact_world}
    four = import_cells("more/4-Estimators.ipynb", "train-exactly", names=names)
    found = defaultdict(dict)
    world = exact_world.ExactWorld(seed)
    for beta in EXACT_BETAS:
        lm = five.train_exact_dpo(world, *five.every_pair(world), beta)
        found["DPO, all pairs"][str(beta)] = world.reached(lm, beta)
    for n, episodes, size in SAMPLED:
        pairs, name = five.some_pairs(world, n, seed), f"DPO, {n:,} pairs"
        lm = five.train_exact_dpo(world, *pairs, EXACT_BETA)
        found[name][str(EXACT_BETA)] = world.reached(lm, EXACT_BETA)
        own = {"ppo_episodes": episodes, "ppo_rollout_size": size}
        policy = four["train_exactly"](world, EXACT_BETA, three.ppo_advantages, **own)
        name = f"PPO, {episodes:,} responses"
        found[name][str(EXACT_BETA)] = world.reached(policy.lm, EXACT_BETA)
    return dict(found)


STAGES = {"exact": (exact, WORLDS), "curve": (curve, SEEDS)}


def main(argv=None):
    """Run the stages that are asked for, and write what each measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.preferences",
        description="Learn from pairs in the tiny world, with and without a model.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--only", choices=STAGES, help="one stage; the others stay")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"one run at once is the least, got --jobs {options.jobs}")
    find_artefacts(TINY, "sft", "reward_model")
    path = ROOT / RESULTS
    results = json.loads(path.read_text("utf8")) if path.exists() else {}
    for name in [options.only] if options.only else STAGES:
        run, seeds = STAGES[name]
        tasks = {seed: (run, seed) for seed in seeds}
        found = list(in_parallel(options.jobs, name, tasks).values())
        results[name] = rounded(by_seed(found))
        write_text(path, json.dumps(results) + "\n")
        print(f"{RESULTS}: {name}")


def by_seed(results: list):
    """Of the same nested dictionaries for each seed, one with a list over the seeds."""
    if not isinstance(results[0], dict):
        return results
    return {name: by_seed([one[name] for one in results]) for name in results[0]}


if __name__ == "__main__":
    main()
