"""The driver: each run once, on after an interruption, equal numbers of episodes."""

import json
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from utils.settings import TINY, load_settings
from workshop import measure
from workshop.measure import KNOWN, NOTEBOOKS, Measurement, Runs, basis

CALLS, BROKEN = [], []


def one(settings, seed, name, n=100):
    CALLS.append((name, seed))
    if (name, seed) in BROKEN:
        raise RuntimeError("out of memory")
    return {"score": seed / 3, "episodes": n, "curves": {"kl": [seed]}}


def both(runs):
    return {"race": runs("race", {name: (one, name) for name in "ab"})}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """A thread in the place of processes, one for each run; and nothing called yet."""

    def pool(n, start, max_tasks_per_child, **how):
        assert (start.get_start_method(), max_tasks_per_child) == ("spawn", 1)
        return ThreadPoolExecutor(n)

    CALLS.clear()
    BROKEN.clear()
    monkeypatch.setattr(measure, "ProcessPoolExecutor", pool)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """One measurement, on code, lessons and models that hold nothing but a 1."""
    place = {name: TINY.folder / name for name in ("sft", "reward_model")}
    files = [f"{room}/a.py" for room in ("utils", "practice", "more")]
    for file in (*files, *(folder / "metrics.json" for folder in place.values())):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text('"1"')
    for notebook in NOTEBOOKS.values():
        one = new_notebook(cells=[new_code_cell("1")])
        nbformat.write(one, tmp_path / notebook)
    found = lambda *_: [tmp_path / folder for folder in place.values()]  # noqa: E731
    monkeypatch.setattr(measure, "find_artefacts", found)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setitem(KNOWN, "race", Measurement(both, "race.json", "35"))
    return tmp_path


def test_runs_take_turns_and_each_is_made_once(tmp_path):
    BROKEN.append(("a", 1))
    with pytest.raises(RuntimeError, match="out of memory"):
        both(Runs(TINY, 2, 1, tmp_path))
    assert CALLS == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    BROKEN.clear()
    CALLS.clear()
    for _ in range(2):  # what is there is not made again
        found = both(Runs(TINY, 2, 1, tmp_path))["race"]
        assert CALLS == [("a", 1)]
    same = {"score": [0, 1 / 3], "episodes": [100] * 2, "curves": {"kl": [[0], [1]]}}
    assert found == {"a": same, "b": same}
    both(Runs(TINY, 3, 1, tmp_path))  # more seeds go on from there
    assert CALLS[1:] == [("a", 2), ("b", 2)]


def test_unequal_numbers_of_episodes_are_refused(tmp_path):
    """Of what is taken up, too; another part may have another number."""
    ways = {"PPO": (one, "PPO", 2_560), "DPO": (one, "DPO", 5_120)}
    for _ in range(2):
        with pytest.raises(ValueError, match="episodes cannot be compared"):
            Runs(TINY, 1, 1, tmp_path)("race", ways)
    Runs(TINY, 1, 1, tmp_path)("alone", {"PPO": (one, "PPO", 7)})


def test_what_is_written(known):
    argv = ["race", "--seeds", "2", "--set", "ppo_episodes=512"]
    measure.main(argv)
    found = json.loads((known / "race.json").read_text())
    assert found.pop("command") == f"python -m workshop.measure {' '.join(argv)}"
    assert found.pop("settings") == vars(load_settings("tiny", {"ppo_episodes": 512}))
    assert found["seeds"] == 2 and found["race"]["a"]["score"] == [0, 0.3333]
    measure.main(argv)  # the same command makes nothing anew
    assert len(CALLS) == 4


def test_an_edit_begins_anew(known):
    """Of a module, a lesson that is run, a model, a setting; not of another lesson."""
    race, seen = KNOWN["race"], {basis(KNOWN["race"], TINY)}
    for file in ("utils/a.py", "more/a.py", "runs/tiny/sft/metrics.json", "5", "8"):
        path = known / NOTEBOOKS.get(file, file)
        path.write_text(path.read_text().replace('"1"', '"2"'))
        assert (basis(race, TINY) in seen) == (file == "8"), file
        seen.add(basis(race, TINY))
    assert basis(race, load_settings("tiny", {"kl_coef": 0.3})) not in seen


def test_one_seed_has_no_interval(capsys):
    with pytest.raises(SystemExit):
        measure.main(["expected", "--seeds", "1"])
    assert "--seeds must be 2 or more, got 1" in capsys.readouterr().err
