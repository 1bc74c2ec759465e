"""Learning from pairs, over several seeds: `python -m tools.preferences`.

What `more/6-Preferences.ipynb` shows beside its own run: the learning curve of the
reward model on pairs in the tiny world, three seeds, and notebook 3's whole run of PPO
on the last of each; and DPO in five exact worlds, with PPO beside it. The functions are
the notebook's. It takes the SFT model and the reward model of `runs/tiny`, and writes
`docs/preferences.json`.
"""

import json
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

from more.common import notebook_3, write_text
from more.preferences import agreement_with_labeller, split_by_prompt
from practice import exact_world
from practice.cells import LOOP, import_cells
from tools.race import alone, by_seed, in_parallel, options_of, rounded
from utils.models import freeze
from utils.runs import NOTEBOOKS, ROOT, prepare
from utils.settings import TINY

RESULTS = "docs/preferences.json"
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
    alone()
    settings, device = prepare("policy", TINY.preset)
    three = notebook_3(settings, device)
    names = {"settings": settings, "device": device, "lesson3": three}
    names |= {"tokenizer": three.tokenizer, "eos_id": three.eos_id}
    return SimpleNamespace(**import_cells(NOTEBOOKS["6"], *FUNCTIONS, names=names))


def curve(seed) -> dict:
    """One seed: agreement with the labeller on new prompts, by the number of pairs.

    And the figures of PPO on the reward model that learnt from the most.
    """
    six = lesson()
    three = six.lesson3
    pairs = six.sample_pairs(three.reference, three.train_prompts, seed)
    train, test = split_by_prompt(six.label(pairs, seed), MEASURED_ON, seed)
    texts = six.both_texts(test)
    utilities = six.utility(texts).view(-1, 2)

    def agreement(model):
        scores = six.score_texts(model, texts).view(-1, 2)
        return agreement_with_labeller(utilities, scores)

    labels, ceiling = agreement(three.reward_model)
    found = {"labels": labels, "ceiling": ceiling, "agreement": {}}
    for size in SIZES:
        model, _ = six.train_on_pairs(train[:size], seed)
        found["agreement"][str(size)] = agreement(model)[0]
    run = six.ppo_on(freeze(model), replace(six.settings, seed=seed))
    figures, _ = three.evaluate(run.policy, show_progress=False)
    return {**found, "ppo": {name: figures[name] for name in FIGURES}}


def exact(seed) -> dict[str, dict[str, float]]:
    """What DPO reaches in an exact world, and PPO with as many responses: by price."""
    alone()
    cells = ("exact-pairs", "exact-some-pairs")
    six = SimpleNamespace(**import_cells(NOTEBOOKS["6"], *cells))
    three = SimpleNamespace(**import_cells(NOTEBOOKS["3"], *LOOP))
    names = {"lesson3": three, "exact_world": exact_world}
    five = import_cells(NOTEBOOKS["5"], "train-exactly", names=names)
    found, world = defaultdict(dict), exact_world.ExactWorld(seed)
    for beta in EXACT_BETAS:
        lm = six.train_exact_dpo(world, *six.every_pair(world), beta)
        found["DPO, all pairs"][str(beta)] = world.reached(lm, beta)
    for n, episodes, size in SAMPLED:
        pairs = six.some_pairs(world, n, seed)
        lm = six.train_exact_dpo(world, *pairs, EXACT_BETA)
        found[f"DPO, {n:,} pairs"][str(EXACT_BETA)] = world.reached(lm, EXACT_BETA)
        own = {"ppo_episodes": episodes, "ppo_rollout_size": size}
        lm = five["train_exactly"](world, EXACT_BETA, three.ppo_advantages, **own).lm
        name = f"PPO, {episodes:,} responses"
        found[name][str(EXACT_BETA)] = world.reached(lm, EXACT_BETA)
    return dict(found)


STAGES = {"exact": (exact, WORLDS), "curve": (curve, SEEDS)}


def main(argv=None):
    """Run the stages that are asked for, and write what each measured."""
    description = "Learn from pairs in the tiny world, with and without a model."
    only = {"choices": STAGES, "help": "one stage; the others stay"}
    options = options_of(argv, "preferences", description, only=only)
    path = ROOT / RESULTS
    results = json.loads(path.read_text("utf8")) if path.exists() else {}
    for name in [options.only] if options.only else STAGES:
        run, seeds = STAGES[name]
        found = in_parallel(options.jobs, name, {seed: (run, seed) for seed in seeds})
        results[name] = rounded(by_seed(list(found.values())))
        write_text(path, json.dumps(results) + "\n")
        print(f"{RESULTS}: {name}")


if __name__ == "__main__":
    main()
