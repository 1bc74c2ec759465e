"""What lessons 5 to 8 show beside their own runs, measured in the tiny world.

Each measurement begins with the SFT model and the reward model of `runs/tiny`, and
takes its functions from the lessons.
"""

import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import torch

from more import common
from practice import exact_world
from practice.cells import LOOP, import_cells
from utils.evaluation import best_possible
from utils.models import PolicyWithValueHead, freeze, load_causal_lm
from utils.runs import prepare
from utils.settings import NOTEBOOKS, ROOT


def notebook(settings, seed) -> SimpleNamespace:
    """Notebook 3, with `own` its settings with this seed, by which it evaluates, too.

    Its models are those of the settings: with the seed it would look for others.
    """
    torch.manual_seed(seed)
    changes = {**settings.changes, "runs_dir": settings.runs_dir}
    settings, device = prepare("policy", settings.preset, changes)
    three = common.notebook_3(settings, device)
    three.lesson3 = three.series = three
    three.own = replace(settings, seed=seed)
    three.evaluate = lesson(three, "3", "evaluate", settings=three.own).evaluate
    return three


def lesson(three, number: str, *cells: str, **names) -> SimpleNamespace:
    """What these cells of another lesson define, on the models of notebook 3."""
    names = {**vars(three), **names}
    return SimpleNamespace(**import_cells(NOTEBOOKS[number], *cells, names=names))


def judged(three, run, settings) -> dict:
    """The figures of a run of PPO's loop, as notebook 3's models and judges see it."""
    evaluate = partial(three.evaluate, show_progress=False)
    names = {"run": run, "settings": settings, "evaluate": evaluate}
    figures = lesson(three, "3", "after", **names).after
    return figures | {"episodes": len(run.history) * settings.ppo_rollout_size}


# Estimators: lesson 5
NAMES = ("REINFORCE", "RLOO", "GRPO", "PPO")
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
GROUPS = {"RLOO": (4, 16), "GRPO": (4, 16)}
SEARCH_SEED = 100  # no seed of what is shown
WORLDS, BETAS = range(5), (0.25, 0.5, 1.0)
EXACT_GROUP = 4  # of the fifteen responses, to the one prompt of an exact world
METHODS = ("whole-response", "grpo-policy-loss", "ways")


def estimator(settings, seed, name, k, rate, reward="reward model") -> dict:
    """One run of an estimator, k responses to a prompt, and its curves."""
    three = notebook(settings, seed)
    own = replace(three.own, ppo_lr=rate)
    five = lesson(three, "5", *METHODS, "in-groups", "train-as", "grammar-score")
    score = {"reward model": three.score, "grammar": five.grammar_score}[reward]
    started = time.process_time()  # on one core, so that a busy machine tells the same
    run = five.train_as(name, k, score, own)
    figures = {"seconds": time.process_time() - started, **judged(three, run, own)}
    figures["peak_gib"] = common.peak_memory(three.device)
    curves = {key: [row[key] for row in run.history] for key in ("score", "kl")}
    return {**figures, "curves": curves}


def in_exact_world(settings, seed, name, beta, changes=()) -> dict:
    """What an estimator reaches in an exact world, of what there is to gain."""
    torch.manual_seed(seed)
    three = SimpleNamespace(**import_cells(NOTEBOOKS["3"], *LOOP))
    names = {"lesson3": three, "exact_world": exact_world}
    five = import_cells(NOTEBOOKS["5"], *METHODS, "train-exactly", names=names)
    advantages, update, own = five["ways"](EXACT_GROUP)[name]
    world, own = exact_world.ExactWorld(seed), {**own, **dict(changes)}
    policy = five["train_exactly"](world, beta, advantages, update, **own)
    episodes = replace(exact_world.SETTINGS, **own).ppo_episodes
    return {"reached": world.reached(policy.lm, beta), "episodes": episodes}


def race(runs) -> dict:
    """Four estimators after a search; GRPO on the grammar as reward; exact worlds."""
    tried = {
        f"{name}, groups of {k}, learning rate {rate:g}": (estimator, name, k, rate)
        for name in NAMES
        for k in GROUPS.get(name, (1,))
        for rate in RATES
    }
    search = runs("search", tried, [SEARCH_SEED])
    search = {way: figures["share"][0] for way, figures in search.items()}
    best = {}
    for name in NAMES:
        mine = [way for way in tried if tried[way][1] == name]
        # Less than a point is noise; of equals the smaller rate, which goes less astray
        order = {way: (round(search[way], 2), -tried[way][3]) for way in mine}
        best[name] = tried[max(mine, key=order.get)]
    raced = runs("race", best)
    grammar = runs("grammar", {"GRPO": (*best["GRPO"], "grammar")})["GRPO"]
    exact = defaultdict(dict)
    for beta in BETAS:
        ways = {name: (in_exact_world, name, beta) for name in NAMES}
        for name, found in runs(f"exact worlds, beta {beta}", ways, WORLDS).items():
            exact[name][str(beta)] = found["reached"]
    return {
        "chosen": {name: way[2:] for name, way in best.items()},
        "search": search,
        "curves": {name: figures.pop("curves") for name, figures in raced.items()},
        "race": raced,
        "grammar": grammar,
        "exact": exact,
    }


# Preferences: lesson 6
SIZES = (50, 200, 1_000, 5_000)  # pairs
EXACT_BETA = 0.5
# Pairs, and of PPO as many responses (two to a pair) in rollouts of
SAMPLED = ((512, 64), (4_992, 256))
# The share of the pairs to measure on: 95 % of what can be had is then known to a point
MEASURED_ON = 0.45
PAIRS = ("sample-pairs", "utility", "label", "both-texts", "split-by-prompt")
PAIRS += ("train-on-pairs", "ppo-on")


def learning_curve(settings, seed) -> dict:
    """Agreement with the labeller on new prompts, by the number of pairs.

    And the figures of PPO on the reward model that learnt from the most.
    """
    three = notebook(settings, seed)
    six = lesson(three, "6", *PAIRS)
    pairs = six.sample_pairs(three.reference, three.train_prompts, seed)
    train, test = six.split_by_prompt(six.label(pairs, seed), MEASURED_ON, seed)
    texts = six.both_texts(test)
    utilities = six.utility(texts).view(-1, 2)

    def agreement(model):
        scores = six.score_texts(model, texts).view(-1, 2)
        return six.agreement_with_labeller(utilities, scores)

    labels, ceiling = agreement(three.reward_model)
    found = {"labels": labels, "ceiling": ceiling, "agreement": {}}
    for size in SIZES:
        model, _ = six.train_on_pairs(train[:size], seed)
        found["agreement"][str(size)] = agreement(model)[0]
    run = six.ppo_on(freeze(model), three.own)
    return {**found, "ppo": judged(three, run, three.own)}


def exact_dpo(settings, seed, n, beta) -> dict:
    """What DPO reaches in an exact world: on n sampled pairs, or on all for 0."""
    torch.manual_seed(seed)
    cells = import_cells(NOTEBOOKS["6"], "exact-pairs", "exact-some-pairs")
    six, world = SimpleNamespace(**cells), exact_world.ExactWorld(seed)
    pairs = six.some_pairs(world, n, seed) if n else six.every_pair(world)
    lm = six.train_exact_dpo(world, *pairs, beta)
    return {"reached": world.reached(lm, beta), "episodes": 2 * n}


def preferences(runs) -> dict:
    """The reward model's learning curve on pairs; DPO and PPO in exact worlds."""
    curve = runs("curve", {"pairs": (learning_curve,)})["pairs"]
    exact = defaultdict(dict)
    ways = {str(beta): (exact_dpo, 0, beta) for beta in BETAS}
    for beta, found in runs("all pairs", ways, WORLDS).items():
        exact["DPO, all pairs"][beta] = found["reached"]
    for n, size in SAMPLED:
        own = {"ppo_episodes": 2 * n, "ppo_rollout_size": size}
        ways = {f"DPO, {n:,} pairs": (exact_dpo, n, EXACT_BETA)}
        ways[f"PPO, {2 * n:,} responses"] = in_exact_world, "PPO", EXACT_BETA, own
        for way, found in runs(f"{n:,} pairs", ways, WORLDS).items():
            exact[way][str(EXACT_BETA)] = found["reached"]
    return {"exact": exact, "curve": curve}


# The frontier: lesson 7
ROLLOUTS = 10  # of the preset's size, as many as the lesson's short runs have
# Of KL, in units of the score; for DPO of the labeller's utility, 3 for a good text
PRICES = {"PPO": (1.0, 0.3, 0.1, 0.03, 0.0), "RLOO": (0.3, 0.1, 0.03, 0.0)}
DPO_PRICES, SEARCH_PRICE, UTILITY = (1.0, 0.3, 0.1, 0.03), 0.3, 3.0
# DPO's learning rate, passes over its pairs, and pairs to a step: all tried once
TRIED = tuple(product((1e-4, 3e-4), (1, 3), (8, 32)))
NUMBERS, POSSIBLE_PRICES = (1, 2, 4, 8, 16), (1.0, 0.3, 0.1)
CANDIDATES = 32  # of the SFT model, to each held-out prompt
REPEATS = 2  # responses of a policy to each held-out prompt
DPO = ("sample-pairs", "utility", "label", "pair-logprobs", "train-dpo")


def place(three, policy, episodes) -> dict:
    """Where a policy stands: its KL, and what each judge of lesson 7 calls positive."""
    figures, rows = three.evaluate(policy, three.held_out * REPEATS)
    found = lesson(three, "7", "frontier-point").point("", figures["kl"], rows)
    return {**found, "score": figures["score"], "episodes": episodes}


def online(settings, seed, name, price, k, rate) -> dict:
    """PPO or RLOO, which write and are scored."""
    three = notebook(settings, seed)
    size = ROLLOUTS * settings.ppo_rollout_size
    own = replace(three.own, kl_coef=price, ppo_lr=rate, ppo_episodes=size)
    five = lesson(three, "5", *METHODS, "in-groups", "train-as")
    run = five.train_as(name, k, three.score, own)
    return place(three, run.policy, len(run.history) * own.ppo_rollout_size)


def offline(settings, seed, price, rate, passes, size) -> dict:
    """DPO on pairs of the SFT model that the labeller answered, `size` to a step."""
    three = notebook(settings, seed)
    six = lesson(three, "6", *DPO, settings=three.own)
    n = ROLLOUTS * settings.ppo_rollout_size // 2  # prompts, each answered twice
    pairs = six.sample_pairs(three.reference, three.train_prompts[:n], seed)
    lm = load_causal_lm(three.sft_folder, three.device).eval()
    six.train_dpo(lm, six.label(pairs, seed), price, rate, seed, passes, size)
    return place(three, PolicyWithValueHead(lm).eval(), 2 * n)


def untrained(settings, seed) -> dict:
    """The points of best-of-n and of the best possible, from the SFT model's texts."""
    three = notebook(settings, seed)
    seven = lesson(three, "7", "frontier-point", "best-of-n")
    sft = PolicyWithValueHead(three.reference).eval()
    _, rows = three.evaluate(sft, three.held_out * CANDIDATES)
    # The prompts come round: each round is a column
    scores = torch.tensor([row["score"] for row in rows]).view(CANDIDATES, -1).T
    log_ref = torch.full(scores.shape, -math.log(CANDIDATES), dtype=torch.float64)
    found = {"best-of-n": {}, "best possible": {}}

    def add(way, label, logs):
        weights = (logs.exp().T / len(scores)).flatten().tolist()
        kl = (logs.exp() * (logs - log_ref)).sum(dim=1).mean().item()
        score = (logs.exp() * scores).sum(dim=1).mean().item()
        found[way][label] = {**seven.point(label, kl, rows, weights), "score": score}

    for n in NUMBERS:  # equal texts score the same up to rounding
        add("best-of-n", f"{n}", seven.best_of_n(log_ref, scores.round(decimals=4), n))
    for price in POSSIBLE_PRICES:
        _, weights = best_possible(scores.double(), 0 * scores, price)
        add("best possible", f"{price:g}", weights.log())
    return found


def over_seeds(label: str, found: dict) -> dict:
    """One point of several: the means, and half the widths of the 95 % intervals."""
    judges = found["shares"]
    (kl, *means), (kl_95, *halves) = (
        x.tolist()
        for x in common.interval_95(torch.tensor([found["kl"], *judges.values()]).T)
    )
    shares, shares_95 = (dict(zip(judges, x, strict=True)) for x in (means, halves))
    point = {"label": label, "kl": kl, "shares": shares}
    return {**point, "kl_95": kl_95, "shares_95": shares_95}


def frontier(runs) -> dict:
    """What a nat of KL buys: PPO, RLOO and DPO at several prices, and the untrained."""
    tried = {
        f"learning rate {x[0]:g}, {x[1]} passes, {x[2]} pairs a step": x for x in TRIED
    }
    ways = {way: (offline, SEARCH_PRICE, *x) for way, x in tried.items()}
    # DPO's own aim: the labeller's utility less the price of the KL
    search = {
        way: UTILITY * x["shares"]["exact judge"][0] - SEARCH_PRICE * x["kl"][0]
        for way, x in runs("search", ways, [SEARCH_SEED]).items()
    }
    raced = json.loads((ROOT / "docs/race.json").read_text("utf8"))["chosen"]
    chosen = {"DPO": tried[max(search, key=search.get)]}
    ways = {f"DPO, {x:g}": (offline, x, *chosen["DPO"]) for x in DPO_PRICES}
    for name, prices in PRICES.items():
        chosen[name] = raced[name]
        ways |= {f"{name}, {x:g}": (online, name, x, *raced[name]) for x in prices}
    points = {name: [] for name in ("PPO", "best-of-n", "RLOO", "DPO", "best possible")}
    for way, found in runs("frontier", ways).items():
        name, label = way.split(", ")
        points[name].append(over_seeds(label, found))
    for name, found in runs("untrained", {"SFT": (untrained,)})["SFT"].items():
        points[name] = [over_seeds(label, x) for label, x in found.items()]
    found = {"chosen": chosen, "search": search, "points": points}
    return {"responses": ROLLOUTS * runs.settings.ppo_rollout_size, **found}


# PPO, DPO and best-of-n at the same KL, on models of any size


def ppo_made(settings, seed) -> dict:
    """Where notebook 3's policy stands, and its rollouts on the way there."""
    three, folder = notebook(settings, seed), settings.folder / "policy"
    policy = PolicyWithValueHead(load_causal_lm(folder, three.device)).eval()
    history = json.loads((folder / "metrics.json").read_text())["history"]
    way = {name: [row[name] for row in history] for name in ("kl", "score")}
    episodes = len(history) * settings.ppo_rollout_size
    return {"end": place(three, policy, episodes), "way": way, "episodes": episodes}


def dpo_made(settings, seed) -> dict:
    """Where DPO stands after each quarter of one pass over its pairs.

    The score decides the pairs. Price and learning rate are PPO's.
    """
    three, n = notebook(settings, seed), settings.ppo_episodes // 2
    six, prompts = lesson(three, "6", *DPO), three.train_prompts[:n]
    both = six.sample_pairs(three.reference, prompts, seed)
    texts = [prompt + text for prompt, *texts in both for text in texts]
    scores, pairs, found = six.score_texts(three.reward_model, texts), [], []
    for (prompt, *texts), order in zip(both, scores.view(-1, 2).argsort(), strict=True):
        rejected, chosen = (texts[i] for i in order)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})

    def watch(lm):
        found.append(place(three, PolicyWithValueHead(lm).eval(), 2 * len(pairs)))
        return found[-1]["kl"]

    lm = load_causal_lm(three.sft_folder, three.device).eval()
    six.train_dpo(lm, pairs, settings.kl_coef, settings.ppo_lr, seed, watch=watch)
    return {"quarters": found, "pairs": len(pairs), "episodes": 2 * len(prompts)}


def equal_kl(runs) -> dict:
    """Of notebook 3's policy, DPO and best-of-n: the score by the KL that it costs."""
    seeds, ways = [runs.settings.seed], {"PPO": (ppo_made,), "DPO": (dpo_made,)}
    untried = runs("untrained", {"SFT": (untrained,)}, seeds)["SFT"]
    return {**runs("trained", ways, seeds), "best-of-n": untried["best-of-n"]}


# More responses to a step: lesson 7
BATCH = ("ppo_episodes", "ppo_rollout_size", "ppo_minibatch_size")
BATCH += ("ppo_micro_batch_size",)


def with_more(settings, seed, times) -> dict:
    """PPO in as many steps, each on so many times the responses."""
    sizes = {name: int(times * getattr(settings, name)) for name in BATCH}
    own = replace(settings, **sizes)
    return estimator(own, seed, "PPO", 1, own.ppo_lr)


def noise(runs):
    """Is it the noise of few responses that keeps PPO from the best possible?

    A real model is asked with a quarter of them, since more would take hours.
    """
    times = (1, 2, 4) if runs.settings.preset == "tiny" else (0.25,)
    ways = {n: {"PPO": (with_more, n)} for n in times}
    return {str(n): runs(f"{n} times the responses", x)["PPO"] for n, x in ways.items()}


# Adapters: lesson 8
# The better of 1e-3 and 2e-3 on seed 100, layout 3, rank 16: J 0.54 against 0.51
RATE = 2e-3
LAYOUTS = ((3, 16), (2, 16), (3, 1), (3, 4), (1, 16))  # layout and rank
LAYOUT = ("reward-adapter", "reward-on", "build", "score-by", "fresh-adapter-run")
LAYOUT += ("train-in",)


def reward_adapters(settings, seed) -> dict:
    """Train lesson 8's reward adapters, where it looks for them: how often right."""
    three = notebook(settings, seed)
    return lesson(three, "8", "reward-adapter", "reward-train", ROLLOUTS=1).accuracies


def adapted(settings, seed, layout, rank) -> dict:
    """PPO with adapters of this rank: lesson 8 says what the layouts are."""
    three = notebook(settings, seed)
    own = replace(three.own, ppo_lr=RATE)
    run, *_ = lesson(three, "8", *LAYOUT).train_in(layout, rank, own)
    return {**judged(three, run, own), "seconds": run.seconds}


def adapters(runs) -> dict:
    """PPO in the layouts of lesson 8. Full fine-tuning beside it is PPO of `race`."""
    seeds = [runs.settings.seed]
    right = runs("reward adapters", {"both": (reward_adapters,)}, seeds)["both"]
    ways = {f"layout {n}, rank {rank}": (adapted, n, rank) for n, rank in LAYOUTS}
    return {
        "rate": RATE,
        "reward accuracy": {name: accuracy for name, (accuracy,) in right.items()},
        "layouts": runs("layouts", ways),
    }
