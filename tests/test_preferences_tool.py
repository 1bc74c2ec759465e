"""The tool that measures learning from pairs, with the runs pretended."""

import json

import pytest

from tools import preferences


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Stages whose result is their seed; the seeds that were asked for, by stage."""
    asked = {name: [] for name in preferences.STAGES}

    def stage(name):
        def run(seed):
            asked[name].append(seed)
            return {"agreement": {"50": seed / 3}, "ceiling": seed}

        return run

    def in_parallel(jobs, title, tasks):
        assert jobs == 2 and title in asked
        return {key: task(*arguments) for key, (task, *arguments) in tasks.items()}

    stages = {name: (stage(name), range(3)) for name in preferences.STAGES}
    monkeypatch.setattr(preferences, "STAGES", stages)
    monkeypatch.setattr(preferences, "in_parallel", in_parallel)
    monkeypatch.setattr(preferences, "find_artefacts", lambda *names: names)
    monkeypatch.setattr(preferences, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return asked


def test_each_stage_is_a_list_over_the_seeds(pretended, tmp_path):
    preferences.main(["--jobs", "2"])
    found = json.loads((tmp_path / preferences.RESULTS).read_text())
    expected = {"agreement": {"50": [0.0, 0.3333, 0.6667]}, "ceiling": [0, 1, 2]}
    assert found == dict.fromkeys(("exact", "curve"), expected)
    assert pretended == dict.fromkeys(pretended, [0, 1, 2])


def test_one_stage_leaves_the_others_as_they_were(pretended, tmp_path):
    path = tmp_path / preferences.RESULTS
    path.write_text('{"exact": "as it was"}')
    preferences.main(["--jobs", "2", "--only", "curve"])
    found = json.loads(path.read_text())
    assert found["exact"] == "as it was" and set(found) == {"exact", "curve"}
    assert pretended["exact"] == []


def test_what_cannot_be_run_is_said_before(pretended, capsys):
    for arguments, says in ((["--jobs", "0"], "got --jobs 0"), (["--only", "x"], "x")):
        with pytest.raises(SystemExit):
            preferences.main(arguments)
        assert says in capsys.readouterr().err
    assert pretended == dict.fromkeys(pretended, [])
