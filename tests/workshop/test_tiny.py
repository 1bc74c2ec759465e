"""What measurements make of their runs, which are pretended; and short real ones."""

import pytest
from pytest import approx

from utils.settings import TINY, load_settings
from workshop import tiny
from workshop.measure import by_seed


class Pretended:
    """In the place of `Runs`: figures that follow from the way and the seed."""

    def __init__(self, figures, seeds=3):
        self.figures, self.seeds, self.settings = figures, seeds, TINY
        self.asked = {}

    def __call__(self, part, ways, seeds=None):
        seeds = list(range(self.seeds) if seeds is None else seeds)
        self.asked[part] = ways, seeds
        made = {w: [self.figures(*ways[w], seed) for seed in seeds] for w in ways}
        return {way: by_seed(rows) for way, rows in made.items()}


def test_the_search_chooses_and_each_seed_races():
    def figures(run, name, *rest):
        if run is tiny.in_exact_world:
            return {"reached": sum(rest)}  # beta and world
        k, rate, *_, seed = rest
        # The best of RLOO is in larger groups, and nobody's at the largest rate
        share = (rate if rate < 1e-3 else 0) * (1 + ((name, k) == ("RLOO", 16)))
        return {"share": share, "kl": len(rest), "curves": {"kl": [seed]}}

    runs = Pretended(figures, 5)
    found = tiny.race(runs)
    best = dict.fromkeys(("REINFORCE", "PPO"), (1, 5e-4))
    assert found["chosen"] == {**best, "RLOO": (16, 5e-4), "GRPO": (4, 5e-4)}
    searched, seeds = runs.asked["search"]
    assert len(searched) == len(found["search"]) == 5 + 10 + 10 + 5 and seeds == [100]
    assert found["race"]["PPO"] == {"share": [5e-4] * 5, "kl": [3] * 5}
    assert found["curves"]["RLOO"] == {"kl": [[0], [1], [2], [3], [4]]}
    assert found["grammar"]["kl"] == [4] * 5  # one word more: the reward
    assert found["exact"]["GRPO"]["0.25"] == [0.25, 1.25, 2.25, 3.25, 4.25]


def test_the_frontier_of_three_seeds():
    """DPO is chosen by its own aim: 3 for a good text, less 0.3 for each nat.

    The seeds 0, 1, 2: mean 1, s = 1, and Student's t of two degrees of freedom.
    """

    def figures(run, *rest):
        bad = run is tiny.offline and rest[1:4] == (3e-4, 1, 8)
        point = {"label": "", "kl": rest[-1], "shares": {"exact judge": 0.9 - bad}}
        ways = ("best-of-n", "best possible")
        return {w: {"2": point} for w in ways} if run is tiny.untrained else point

    runs = Pretended(figures)
    found = tiny.frontier(runs)
    aims = sorted(found["search"].values())  # 100 is the seed of the search
    assert aims == approx([-3 * 0.1 - 30, *[3 * 0.9 - 30] * 7])
    assert found["chosen"]["DPO"] != (3e-4, 1, 8) and found["responses"] == 2_560
    labels = {way: [x["label"] for x in line] for way, line in found["points"].items()}
    assert labels["PPO"] == ["1", "0.3", "0.1", "0.03", "0"]
    assert labels["RLOO"] == labels["PPO"][1:] and labels["DPO"] == labels["PPO"][:4]
    (point,) = found["points"]["best-of-n"]
    assert point.pop("kl_95") == approx(4.3026527 / 3**0.5)
    assert point.pop("shares_95") == {"exact judge": approx(0)}
    shares = {"exact judge": approx(0.9)}
    assert point == {"label": "2", "kl": 1.0, "shares": shares}


def test_pairs_and_responses_that_are_compared_are_as_many():
    runs = Pretended(lambda run, *rest: {"reached": rest[-1]})
    found = tiny.preferences(runs)["exact"]
    for n in (512, 4_992):
        ways, _ = runs.asked[f"{n:,} pairs"]
        dpo, ppo = f"DPO, {n:,} pairs", f"PPO, {2 * n:,} responses"
        assert ways[dpo][1] == n and ways[ppo][3]["ppo_episodes"] == 2 * n
        assert found[dpo] == found[ppo] == {"0.5": [0, 1, 2, 3, 4]}


@pytest.mark.slow
def test_the_lessons_are_measured(series, monkeypatch):
    """For real, with few rollouts: what is learnt from is counted, and it learns."""
    few = {"ppo_episodes": 512, "possible_samples": 8}
    settings = load_settings("tiny", few | {"runs_dir": str(series[0].parent)})
    monkeypatch.setattr(tiny, "ROLLOUTS", 2)
    monkeypatch.setattr(tiny, "CANDIDATES", 8)
    found = tiny.estimator(settings, 7, "GRPO", 16, 1e-4, "grammar")
    assert found["episodes"] == 512 and found["curves"]["kl"][0] == 0
    assert 0 <= found["exactly_positive"] <= 1 and found["seconds"] > 0
    assert tiny.online(settings, 7, "RLOO", 0.3, 4, 5e-4)["episodes"] == 512
    assert tiny.offline(settings, 7, 0.3, 1e-4, 1, 32)["episodes"] == 512
    ways = tiny.untrained(settings, 7)
    shares = [x["shares"]["reward model"] for x in ways["best-of-n"].values()]
    assert shares == sorted(shares) and ways["best-of-n"]["1"]["kl"] == approx(0)
    assert min(tiny.reward_adapters(settings, 42).values()) > 0.85
    assert tiny.adapted(settings, 7, 2, 4)["episodes"] == 512
    sampled = tiny.in_exact_world(settings, 0, "PPO", 0.5, {"ppo_episodes": 512})
    assert sampled["episodes"] == 512 and 0.3 < sampled["reached"] < 1
    assert tiny.exact_dpo(settings, 0, 0, 0.5)["reached"] > 0.999
