"""The driver: each run once, on after an interruption, equal numbers of episodes."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT, code_cells
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


def test_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "basis", lambda *_: "basis")
    monkeypatch.setitem(KNOWN, "race", Measurement(both, "race.json", "35"))
    argv = ["race", "--seeds", "2", "--set", "ppo_episodes=512"]
    measure.main(argv)
    found = json.loads((tmp_path / "race.json").read_text())
    assert found.pop("command") == f"python -m workshop.measure {' '.join(argv)}"
    assert found.pop("settings") == vars(load_settings("tiny", {"ppo_episodes": 512}))
    assert found["seeds"] == 2 and found["race"]["a"]["score"] == [0, 0.3333]
    measure.main(argv)  # the same command makes nothing anew
    assert len(CALLS) == 4


def test_an_edit_begins_anew(tmp_path, monkeypatch):
    """Of a module, a lesson that is run, a model, a setting; not of another lesson."""
    (tmp_path / "metrics.json").write_text("of a model")
    monkeypatch.setattr(measure, "find_artefacts", lambda *_: [tmp_path])
    monkeypatch.setattr(measure, "fingerprint", list)
    parts = basis(KNOWN["race"], TINY)
    files = ("utils/ppo.py", "practice/cells.py", "more/lora.py", "workshop/tiny.py")
    rest = [TINY, "of a model", *((ROOT / x).read_text("utf8") for x in files)]
    assert all(part in parts for part in rest)
    for number, name in NOTEBOOKS.items():
        counts = [cell.source in parts for cell in code_cells(name).values()]
        assert all(counts) if number in "35" else not all(counts), name
