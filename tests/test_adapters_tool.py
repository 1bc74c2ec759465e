"""The tool that measures adapters, with the runs pretended."""

import json
from types import SimpleNamespace

import pytest

from tools import adapters


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that are soon done, and what was asked for."""
    asked = []

    def measure(three, seven, layout, rank, seed):
        asked.append((layout, rank, seed))
        return {"share": rank + seed / 1e6, "score": seed / 3, "seconds": 1.0}

    three = SimpleNamespace(sft_folder="sft", settings=adapters.TINY)
    seven = SimpleNamespace(
        ADAPTERS=tmp_path, train_reward_adapter=lambda base, place: 0.123456
    )
    monkeypatch.setattr(adapters, "lessons", lambda: (three, seven))
    monkeypatch.setattr(adapters, "measure", measure)
    monkeypatch.setattr(adapters, "find_artefacts", lambda *names: names)
    monkeypatch.setattr(adapters, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return asked


def results(tmp_path):
    return json.loads((tmp_path / adapters.RESULTS).read_text())


def test_three_seeds_of_each_are_run(pretended, tmp_path):
    adapters.main([])
    found = results(tmp_path)
    assert found["reward accuracy"]["on-the-sft-model"] == 0.1235
    assert pretended == [
        (*raced, seed) for raced in adapters.RACED for seed in (0, 1, 2)
    ]
    assert found["layouts"]["layout 3, rank 1"]["score"] == [0.0, 0.3333, 0.6667]
    assert found["layouts"]["layout 2, rank 16"]["share"] == [16.0, 16.0, 16.0]
    assert len(found["layouts"]) == len(adapters.RACED)


def test_what_was_measured_is_not_measured_again(pretended, tmp_path, monkeypatch):
    real, left = adapters.measure, 5

    def interrupted(*arguments):
        nonlocal left
        if not (left := left - 1):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(adapters, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.main([])
    assert len(pretended) == 4
    assert len(results(tmp_path)["layouts"]["layout 3, rank 16"]["share"]) == 3
    monkeypatch.setattr(adapters, "measure", real)
    adapters.main([])
    assert len(pretended) == len(set(pretended)) == 3 * len(adapters.RACED)
    adapters.main([])
    assert len(pretended) == 3 * len(adapters.RACED)
