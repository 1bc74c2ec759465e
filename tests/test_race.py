"""The tools that measure over seeds, with the runs pretended, and their statistics."""

import itertools
import json

import pytest
import torch

from more.common import best_of_n, interval_95
from practice.exact_world import ExactWorld
from tools import frontier, preferences, race


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What was run, in the place of which something comes out at once."""
    asked = []

    def run(name, k, rate, seed, reward="reward model"):
        asked.append((name, k, rate, seed, reward))
        # The best of RLOO is in larger groups, and nobody's at the largest rate
        share = (rate if rate < 1e-3 else 0.0) * (1 + ((name, k) == ("RLOO", 16)))
        return {"share": share, "kl": seed / 3, "curves": {"score": [seed], "kl": [k]}}

    def in_parallel(jobs, title, tasks):
        assert jobs == 2
        return {key: task(*arguments) for key, (task, *arguments) in tasks.items()}

    monkeypatch.setattr(race, "race", run)
    monkeypatch.setattr(race, "exact", lambda name, world, beta: beta + world)
    monkeypatch.setattr(race, "find_artefacts", lambda *names: names)
    monkeypatch.setattr(race, "in_parallel", in_parallel)
    monkeypatch.setattr(race, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return asked


def test_the_search_chooses_and_five_seeds_run(asked, tmp_path):
    race.main(["--jobs", "2"])
    found = json.loads((tmp_path / race.RESULTS).read_text())
    best = {name: [1, 5e-4] for name in ("REINFORCE", "PPO")}
    assert found["chosen"] == {**best, "RLOO": [16, 5e-4], "GRPO": [4, 5e-4]}
    assert len(found["search"]) == 5 + 10 + 10 + 5
    raced = [one for one in asked if one[3] != race.SEARCH_SEED]
    assert len(asked) == 30 + 25 and len(raced) == 25
    assert [one[3] for one in raced if one[0] == "RLOO"] == [0, 1, 2, 3, 4]
    assert [one[4] for one in raced].count("grammar") == 5
    kl = [0.0, 0.3333, 0.6667, 1.0, 1.333]
    assert found["race"]["PPO"] == {"share": [5e-4] * 5, "kl": kl}
    seeds = [[0], [1], [2], [3], [4]]
    assert found["curves"]["RLOO"] == {"score": seeds, "kl": [[16]] * 5}
    assert found["exact"]["GRPO"]["0.25"] == [0.25, 1.25, 2.25, 3.25, 4.25]


@pytest.mark.parametrize(
    "tool, option, value, says",
    [
        (race, "--jobs", "0", "got --jobs 0"),
        (preferences, "--only", "x", "invalid choice: 'x'"),
        (frontier, "--seeds", "1", "invalid choice: 1"),
    ],
)
def test_what_cannot_be_run_is_said_before(asked, capsys, tool, option, value, says):
    with pytest.raises(SystemExit):
        tool.main([option, value])
    assert says in capsys.readouterr().err and not asked


def test_a_point_of_the_frontier_has_its_interval():
    """The seeds 0, 1, 2: mean 1, s = 1, and Student's t of two degrees of freedom."""
    points = [
        {"label": "8", "kl": x, "shares": {"judge": 0.5}} for x in (0.0, 1.0, 2.0)
    ]
    half = pytest.approx(4.303 / 3**0.5)
    expected = {"label": "8", "kl": 1.0, "kl_95": half}
    expected |= {"shares": {"judge": 0.5}, "shares_95": {"judge": 0.0}}
    assert frontier.over_seeds(points) == expected
    with pytest.raises(ValueError, match="takes 2 to 10 runs, got 1"):
        interval_95(torch.ones(1))


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_n_is_what_all_draws_of_n_give(n):
    """Each of the 15^n in the exact world, where eight responses score the same."""
    world = ExactWorld(seed=3)
    ref, scores = world.logprobs(world.reference).detach(), world.scores
    expected = torch.zeros(15, dtype=torch.float64)
    for drawn in itertools.product(range(15), repeat=n):
        # Of equal ones the first: they come in any order
        best = max(drawn, key=lambda i: scores[i].item())
        expected[best] += ref[list(drawn)].sum().exp()
    # Of several prompts at once, each is as it is alone
    rows = best_of_n(torch.stack([ref.flip(0), ref]), torch.stack([-scores, scores]), n)
    torch.testing.assert_close(rows[1].exp(), expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n(ref, scores, 0)
