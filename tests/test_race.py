"""The tool that races the estimators, with the runs pretended."""

import json

import pytest

from tools import race


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that are as good as their learning rate says; what was asked for."""
    asked = []

    def run(name, k, rate, seed, reward="reward model"):
        asked.append((name, k, rate, seed, reward))
        # the best of RLOO is in larger groups, and nobody's at the largest rate
        share = rate if rate < 1e-3 else 0.0
        share *= 2 if (name, k) == ("RLOO", 16) else 1
        return {"share": share, "kl": seed / 3, "curves": {"score": [seed], "kl": [k]}}

    def in_parallel(jobs, title, tasks):
        assert jobs == 2
        return {key: task(*arguments) for key, (task, *arguments) in tasks.items()}

    monkeypatch.setattr(race, "race", run)
    monkeypatch.setattr(race, "exact", lambda name, world, beta: beta + world)
    monkeypatch.setattr(race, "in_parallel", in_parallel)
    monkeypatch.setattr(race, "find_artefacts", lambda *names: names)
    monkeypatch.setattr(race, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return asked


def test_the_search_chooses_and_five_seeds_run(pretended, tmp_path):
    race.main(["--jobs", "2"])
    found = json.loads((tmp_path / race.RESULTS).read_text())
    best = {name: [1, 5e-4] for name in ("REINFORCE", "PPO")}
    assert found["chosen"] == {**best, "RLOO": [16, 5e-4], "GRPO": [4, 5e-4]}
    assert len(found["search"]) == 5 + 10 + 10 + 5
    assert found["search"]["RLOO, groups of 16, learning rate 0.0005"] == 1e-3
    searched = [one for one in pretended if one[3] == race.SEARCH_SEED]
    raced = [one for one in pretended if one[3] != race.SEARCH_SEED]
    assert len(searched) == 30 and len(raced) == 25
    assert [one[3] for one in raced if one[0] == "RLOO"] == [0, 1, 2, 3, 4]
    assert {one[4] for one in raced} == {"reward model", "grammar"}
    assert found["race"]["PPO"]["kl"] == [0.0, 0.3333, 0.6667, 1.0, 1.333]
    assert "curves" not in found["race"]["PPO"]
    assert found["curves"]["RLOO"] == {
        "score": [[0], [1], [2], [3], [4]],
        "kl": [[16]] * 5,
    }
    assert found["exact"]["GRPO"]["0.25"] == [0.25, 1.25, 2.25, 3.25, 4.25]


def test_what_cannot_be_run_is_said_before(pretended, capsys):
    with pytest.raises(SystemExit):
        race.main(["--jobs", "0"])
    assert "got --jobs 0" in capsys.readouterr().err and not pretended


def test_each_task_runs_in_a_process_of_its_own():
    """With its results in their places; `divmod` stands for a run."""
    found = race.in_parallel(2, "some", {n: (divmod, n, 4) for n in (9, 3)})
    assert found == {9: (2, 1), 3: (0, 3)}
