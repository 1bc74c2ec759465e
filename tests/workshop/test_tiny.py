"""What measurements make of their runs, which are pretended; and short real ones."""

import pytest
from pytest import approx

from utils.settings import TINY, load_settings
from workshop import tiny


class Pretended:
    """In the place of `Runs`: figures that follow from the way and the seed."""

    def __init__(self, figures, seeds=3):
        self.figures, self.seeds, self.settings = figures, seeds, TINY
        self.asked = {}

    def __call__(self, part, ways, seeds=None):
        seeds = list(range(self.seeds) if seeds is None else seeds)
        self.asked[part] = ways, seeds
        made = {w: [self.figures(*ways[w], seed) for seed in seeds] for w in ways}
        return {w: tiny_by_seed(x) for w, x in made.items()}


def tiny_by_seed(rows):
    if not isinstance(rows[0], dict):
        return rows
    return {name: tiny_by_seed([row[name] for row in rows]) for name in rows[0]}


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


def test_as_many_responses_as_pairs_have_texts():
    def figures(run, *rest):
        return (
            {"reached": rest[-1]} if run is not tiny.learning_curve else {"labels": 1}
        )

    runs = Pretended(figures)
    found = tiny.preferences(runs)
    assert found["curve"] == {"labels": [1, 1, 1]}
    reached = {"0.5": [0, 1, 2, 3, 4]}
    names = {"DPO, 512 pairs", "PPO, 1,024 responses", "DPO, 4,992 pairs"}
    for name in (*names, "PPO, 9,984 responses"):
        assert found["exact"][name] == reached
    assert found["exact"]["DPO, all pairs"].keys() == {"0.25", "0.5", "1.0"}
    for n in (512, 4_992):
        (dpo, ppo), _ = runs.asked[f"{n:,} pairs"]
        ways, _ = runs.asked[f"{n:,} pairs"]
        assert ways[dpo][1] == n and ways[ppo][3]["ppo_episodes"] == 2 * n


def test_a_point_of_the_frontier_has_its_interval():
    """The seeds 0, 1, 2: mean 1, s = 1, and Student's t of two degrees of freedom."""
    half = approx(4.303 / 3**0.5)
    found = {"label": ["", "", ""], "kl": [0.0, 1.0, 2.0], "shares": {"x": [0.5] * 3}}
    expected = {"label": "8", "kl": 1.0, "kl_95": half}
    expected |= {"shares": {"x": 0.5}, "shares_95": {"x": 0.0}}
    assert tiny.over_seeds("8", found) == expected


def test_the_frontier_takes_dpo_where_its_own_aim_is_highest():
    """The utility 3 for a good text, less 0.3 for each nat."""

    def point(kl, share):
        return {"label": "", "kl": kl, "shares": {"exact judge": share}}

    def figures(run, *rest):
        if run is tiny.untrained:
            ways = ("best-of-n", "best possible")
            return {way: {"1": point(1.0 + rest[-1], 0.5)} for way in ways}
        best = rest[1:4] == (3e-4, 1, 8) if run is tiny.offline else False
        return point(2.0 + rest[-1] if best else 7.0, 0.6 if best else 0.9)

    runs = Pretended(figures)
    found = tiny.frontier(runs)
    aims = found["search"]
    assert len(aims) == 8 and runs.asked["search"][1] == [100]
    # 100 is the seed of the search: 3 * 0.6 - 0.3 * 102, and 3 * 0.9 - 0.3 * 7
    assert min(aims.values()) == approx(-28.8) and max(aims.values()) == approx(0.6)
    assert found["chosen"]["DPO"] != (3e-4, 1, 8) and found["responses"] == 2_560
    labels = {way: [x["label"] for x in line] for way, line in found["points"].items()}
    assert labels["PPO"] == ["1", "0.3", "0.1", "0.03", "0"]
    assert labels["RLOO"] == labels["PPO"][1:] and labels["DPO"] == labels["PPO"][:4]
    assert found["points"]["best-of-n"][0]["kl"] == approx(2.0)


def test_adapters_are_those_of_the_lesson():
    def figures(run, *rest):
        if run is tiny.reward_adapters:
            return {"on-the-sft-model": 0.9}
        return {"share": rest[0] + rest[-1] / 10}  # layout and seed

    found = tiny.adapters(Pretended(figures))
    assert found["reward accuracy"] == {"on-the-sft-model": 0.9}
    assert found["layouts"]["layout 3, rank 1"]["share"] == approx([3.0, 3.1, 3.2])


@pytest.mark.slow
def test_the_lessons_are_measured(series, monkeypatch):
    """For real, with few rollouts: what is learnt from is counted, and it learns."""
    few = {"ppo_episodes": 512, "possible_samples": 8, "runs_dir": series[0].parent}
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
