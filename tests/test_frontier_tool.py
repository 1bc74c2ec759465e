"""The tool that measures the frontier over seeds, with the runs pretended."""

import json

import pytest

from tools import frontier


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Points whose KL is their seed and whose shares are their price; what was run."""
    asked = []

    def point(label, kl, share):
        return {"label": label, "kl": float(kl), "shares": {"exact judge": share}}

    def online(name, prices, seed, k, rate):
        asked.append((name, seed, k, rate))
        return [point(f"{price:g}", seed, price) for price in prices]

    def offline(runs, seed):
        asked.append(("DPO", seed, *runs[0][1:]))
        # a bold run spends too much for what it gets
        return [
            point(f"{price:g}", seed * rate, 0.5 + passes / 10 + 0.01 * (size == 32))
            for price, rate, passes, size in runs
        ]

    def untrained(seed):
        lines = {"best-of-n": ("1", "2"), "best possible": ("0.1",)}
        return {
            name: [point(label, seed, 1.0) for label in labels]
            for name, labels in lines.items()
        }

    def in_parallel(jobs, title, tasks):
        assert jobs == 2
        return {key: task(*arguments) for key, (task, *arguments) in tasks.items()}

    for function in (online, offline, untrained, in_parallel):
        monkeypatch.setattr(frontier, function.__name__, function)
    monkeypatch.setattr(frontier, "find_artefacts", lambda *names: names)
    monkeypatch.setattr(frontier, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    raced = {"chosen": {"REINFORCE": [1, 0.1], "RLOO": [4, 0.2], "PPO": [1, 0.3]}}
    (tmp_path / "docs/race.json").write_text(json.dumps(raced))
    return asked


def test_the_search_chooses_and_each_point_has_its_interval(pretended, tmp_path):
    frontier.main(["--jobs", "2"])
    found = json.loads((tmp_path / frontier.RESULTS).read_text())
    assert found["chosen"] == {"PPO": [1, 0.3], "RLOO": [4, 0.2], "DPO": [1e-4, 3, 32]}
    # 3 (0.5 + 0.3 + 0.01) - 0.3 * 100 * 1e-4
    assert max(found["search"].values()) == pytest.approx(2.427)
    assert len(found["search"]) == len(frontier.TRIED)
    assert pretended[1:4] == [
        ("PPO", 0, 1, 0.3),
        ("RLOO", 0, 4, 0.2),
        ("DPO", 0, 1e-4, 3, 32),
    ]
    assert len(pretended) == 1 + 3 * 3 and pretended[-1][1] == 2
    points = found["points"]
    lengths = {name: len(prices) for name, prices in frontier.PRICES.items()}
    lengths |= {"best-of-n": 2, "best possible": 1}
    assert {name: len(line) for name, line in points.items()} == lengths
    assert tuple(points) == frontier.WAYS
    # The seeds 0, 1, 2: mean 1, s = 1, and Student's t of two degrees of freedom
    half = 4.303 / 3**0.5
    first = points["PPO"][0]
    assert first["label"] == "1" and first["shares"] == {"exact judge": 1.0}
    assert first["kl"] == 1.0 and first["kl_95"] == pytest.approx(half, rel=1e-3)
    assert first["shares_95"] == {"exact judge": 0.0}


def test_more_seeds_if_they_are_asked_for(pretended, tmp_path):
    frontier.main(["--jobs", "2", "--seeds", "2"])
    found = json.loads((tmp_path / frontier.RESULTS).read_text())
    assert found["seeds"] == 2 and found["points"]["RLOO"][0]["kl"] == 0.5


def test_what_cannot_be_run_is_said_before(pretended, capsys):
    for arguments, says in (
        (["--jobs", "0"], "got --jobs 0"),
        (["--seeds", "1"], "takes 2 to 10 seeds, got --seeds 1"),
    ):
        with pytest.raises(SystemExit):
            frontier.main(arguments)
        assert says in capsys.readouterr().err
    assert not pretended
