"""What measurements make of their runs; and short ones, for real."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from pytest import approx

from utils.settings import load_settings
from workshop import tiny


def test_a_point_of_three_seeds():
    """0, 1, 2: mean 1, s = 1, and Student's t of two degrees of freedom."""
    found = {"kl": [0.0, 1.0, 2.0], "shares": {"exact judge": [0.9] * 3}}
    point = tiny.over_seeds("2", found)
    assert point.pop("kl_95") == approx(4.3026527 / 3**0.5)
    assert point.pop("shares_95") == {"exact judge": approx(0)}
    shares = {"exact judge": approx(0.9)}
    assert point == {"label": "2", "kl": 1.0, "shares": shares}


def test_of_rates_that_are_equal_to_a_point_the_smaller_is_raced():
    shares = {5e-5: 0.884, 5e-4: 0.8899, 1e-3: 0.8901}  # by learning rate

    def runs(part, ways, seeds=None):
        if part != "search":
            return {way: {"curves": [], "reached": []} for way in ways}
        return {way: {"share": [shares.get(x[3], 0.7)]} for way, x in ways.items()}

    chosen = tiny.race(runs)["chosen"]
    assert [rate for _, rate in chosen.values()] == [5e-4] * 4


@pytest.mark.slow
def test_the_lessons_are_measured(series, monkeypatch):
    """For real, with few rollouts: what is learnt from is counted, and it learns."""
    few = {"ppo_episodes": 512, "possible_samples": 8}
    settings = load_settings("tiny", few | {"runs_dir": str(series[0].parent)})
    three = vars(tiny.notebook(settings, 7))  # read once
    monkeypatch.setattr(tiny, "notebook", lambda *_: SimpleNamespace(**three))
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
    ppo = tiny.ppo_made(settings, 7)
    assert ppo["end"]["score"] > 0.5 and ppo["way"]["kl"][0] == approx(0, abs=1e-4)
    assert ppo["episodes"] == 7_680 and len(ppo["way"]["score"]) == 30
    dpo = tiny.dpo_made(replace(settings, ppo_episodes=2_048, ppo_lr=1e-3), 7)
    assert dpo["episodes"] == 2_048 and len(dpo["quarters"]) == 4
    *_, third, last = (quarter["score"] for quarter in dpo["quarters"])
    assert (third + last) / 2 > 0.1  # it falls to -0.3 if the worse one is chosen
