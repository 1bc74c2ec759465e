"""The frontier over several seeds: `python -m tools.frontier`.

What `more/7-Frontier.ipynb` shows beside its own run, in the tiny world: PPO, RLOO and
DPO at several prices of KL, each with as many responses; best-of-n, and the best
possible. PPO and RLOO take group and learning rate from `docs/race.json`; for DPO a
small search chooses. It takes the SFT model and the reward model of `runs/tiny`, and
writes `docs/frontier.json`: means over the seeds, with 95 % intervals.
"""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import torch

from more.common import T_975, best_of_n, best_possible, interval_95, write_text
from practice.cells import import_cells
from tools import race
from tools.race import alone, in_parallel, options_of, rounded
from utils.models import PolicyWithValueHead, load_causal_lm
from utils.runs import NOTEBOOKS, ROOT, prepare
from utils.settings import TINY

RESULTS = "docs/frontier.json"
RESPONSES = 10 * TINY.ppo_rollout_size  # as many as the lesson's short runs have
# Of KL, in units of the score; for DPO of the labeller's utility, 3 for a good text
PRICES = {
    "PPO": (1.0, 0.3, 0.1, 0.03, 0.0),
    "RLOO": (0.3, 0.1, 0.03, 0.0),
    "DPO": (1.0, 0.3, 0.1, 0.03),
}
WAYS = ("PPO", "best-of-n", "RLOO", "DPO", "best possible")
# DPO's learning rate, passes over its pairs, and pairs to a step: all tried once
TRIED = list(itertools.product((1e-4, 3e-4), (1, 3), (8, 32)))
SEARCH_SEED, SEARCH_PRICE, UTILITY = 100, 0.3, 3.0
NUMBERS, POSSIBLE_PRICES = (1, 2, 4, 8, 16), (1.0, 0.3, 0.1)
CANDIDATES = 32  # of the SFT model, to each held-out prompt
REPEATS = 2  # responses of a policy to each held-out prompt
DPO = ("sample-pairs", "utility", "label", "pair-logprobs", "train-dpo")


def lessons(seed) -> SimpleNamespace:
    """The functions and models of the lessons, with settings of this seed."""
    alone()
    torch.manual_seed(seed)
    settings, device = prepare("policy", TINY.preset)
    own = replace(settings, seed=seed, ppo_episodes=RESPONSES)
    three, four = race.lessons(settings, device)
    # Measured with this seed, too
    names = {**vars(three), "settings": own}
    evaluate = import_cells(NOTEBOOKS["3"], "judges", "evaluate", names=names)[
        "evaluate"
    ]
    names = {"settings": own, "device": device, "lesson3": three, "evaluate": evaluate}
    names |= {"tokenizer": three.tokenizer, "eos_id": three.eos_id}
    names |= {"train_as": four.train_as}
    names |= import_cells(NOTEBOOKS["7"], "frontier-point", names=names)
    names |= import_cells(NOTEBOOKS["6"], *DPO, names=names)
    return SimpleNamespace(**names)


def place(series, price, policy) -> dict:
    """Where a policy of this price stands."""
    figures, rows = series.evaluate(policy, series.lesson3.held_out * REPEATS)
    return series.point(f"{price:g}", figures["kl"], rows)


def online(name, prices, seed, k, rate) -> list[dict]:
    """PPO or RLOO, which write and are scored: a run at each price."""
    series, points = lessons(seed), []
    for price in prices:
        own = replace(series.settings, kl_coef=price, ppo_lr=rate)
        run = series.train_as(name, k, series.lesson3.score, own)
        points.append(place(series, price, run.policy))
    return points


def offline(runs, seed) -> list[dict]:
    """DPO on pairs of the SFT model that the labeller answered: a point of each run.

    A run is a price, a learning rate, passes over the pairs, and pairs to a step.
    """
    series, points = lessons(seed), []
    three = series.lesson3
    prompts = three.train_prompts[: RESPONSES // 2]  # each is answered twice
    pairs = series.label(series.sample_pairs(three.reference, prompts, seed), seed)
    for price, rate, passes, size in runs:
        lm = load_causal_lm(three.sft_folder, series.device).eval()
        series.train_dpo(lm, pairs, price, rate, seed, passes, size)
        points.append(place(series, price, PolicyWithValueHead(lm).eval()))
    return points


def untrained(seed) -> dict[str, list[dict]]:
    """Best-of-n and the best possible, from responses of the SFT model."""
    series = lessons(seed)
    three = series.lesson3
    sft = PolicyWithValueHead(three.reference).eval()
    _, rows = series.evaluate(sft, three.held_out * CANDIDATES)
    # The prompts come round: each round is a column
    scores = torch.tensor([row["score"] for row in rows]).view(CANDIDATES, -1).T
    log_ref = torch.full(scores.shape, -math.log(CANDIDATES), dtype=torch.float64)

    def weighted(label, weights, kl):
        weights = (weights.T / len(scores)).flatten().tolist()
        return series.point(label, kl, rows, weights)

    best, possible = [], []
    for n in NUMBERS:
        # Equal texts score the same up to rounding
        logs = best_of_n(log_ref, scores.round(decimals=4), n)
        kl = (logs.exp() * (logs - log_ref)).sum(dim=1).mean().item()
        best.append(weighted(f"{n}", logs.exp(), kl))
    for price in POSSIBLE_PRICES:
        weights, found = best_possible(scores, price)
        possible.append(weighted(f"{price:g}", weights, found["kl"]))
    return {"best-of-n": best, "best possible": possible}


def over_seeds(points) -> dict:
    """One point of several: the means, and half the widths of the 95 % intervals."""
    judges = list(points[0]["shares"])
    rows = [[one["kl"], *(one["shares"][judge] for judge in judges)] for one in points]
    means, halves = (x.tolist() for x in interval_95(torch.tensor(rows)))
    return {
        "label": points[0]["label"],
        "kl": means[0],
        "shares": dict(zip(judges, means[1:], strict=True)),
        "kl_95": halves[0],
        "shares_95": dict(zip(judges, halves[1:], strict=True)),
    }


def search() -> dict:
    """What DPO reaches with each of TRIED: the labeller's utility less the KL's price.

    By one run each; that is DPO's own aim, and the best of them is chosen.
    """
    found = offline([(SEARCH_PRICE, *one) for one in TRIED], SEARCH_SEED)
    return {
        one: UTILITY * point["shares"]["exact judge"] - SEARCH_PRICE * point["kl"]
        for one, point in zip(TRIED, found, strict=True)
    }


def main(argv=None):
    """Search, train at each price, and write what was measured."""
    description = "What a nat of KL buys in the tiny world, for five methods."
    seeds = {"type": int, "default": 3, "choices": T_975, "help": "runs of each point"}
    options = options_of(argv, "frontier", description, seeds=seeds)
    tried = in_parallel(options.jobs, "search", {"DPO": (search,)})["DPO"]
    raced = json.loads((ROOT / race.RESULTS).read_text("utf8"))["chosen"]
    chosen = {name: raced[name] for name in ("PPO", "RLOO")}
    chosen["DPO"] = max(tried, key=tried.get)
    seeds, tasks = range(options.seeds), {}
    for seed in seeds:
        for name in ("PPO", "RLOO"):
            tasks[name, seed] = (online, name, PRICES[name], seed, *chosen[name])
        runs = [(price, *chosen["DPO"]) for price in PRICES["DPO"]]
        tasks["DPO", seed] = (offline, runs, seed)
        tasks["untrained", seed] = (untrained, seed)
    found = in_parallel(options.jobs, "frontier", tasks)
    points = {}
    for name in WAYS:
        lines = (
            found[name, s] if name in PRICES else found["untrained", s][name]
            for s in seeds
        )
        points[name] = [over_seeds(some) for some in zip(*lines, strict=True)]
    results = {
        "seeds": options.seeds,
        "responses": RESPONSES,
        "chosen": chosen,
        "search": {
            f"learning rate {rate:g}, {passes} passes, {size} pairs a step": aim
            for (rate, passes, size), aim in tried.items()
        },
        "points": points,
    }
    write_text(ROOT / RESULTS, json.dumps(rounded(results)) + "\n")
    print(f"{RESULTS}: {chosen}")


if __name__ == "__main__":
    main()
