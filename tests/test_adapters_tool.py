"""The tool that measures adapters, with the runs pretended."""

import json
from types import SimpleNamespace

import pytest

from tools import adapters


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs whose share grows with learning rate and seed; and what was asked for."""
    asked = []

    def measure(three, seven, layout, rank, seed, rate):
        asked.append((layout, rank, seed, rate))
        return {"share": rate + seed / 1000, "score": seed / 3, "seconds": 1.0}

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


def test_the_best_rate_is_run_on_three_seeds_of_each(pretended, tmp_path):
    adapters.main([])
    found = results(tmp_path)
    assert found["rate"] == 2e-3  # 0.102 against 0.101
    assert found["reward accuracy"]["on-the-sft-model"] == 0.1235
    assert pretended[:2] == [(3, 16, 100, rate) for rate in adapters.RATES]
    assert len(pretended) == 2 + 3 * len(adapters.RACED)
    assert {one[3] for one in pretended[2:]} == {2e-3}
    assert found["layouts"]["layout 3, rank 1"]["score"] == [0.0, 0.3333, 0.6667]
    for (layout, rank), runs in zip(
        adapters.RACED, found["layouts"].values(), strict=True
    ):
        assert len(runs["share"]) == 3
        assert [one[2] for one in pretended if one[:2] == (layout, rank)][-3:] == [
            0, 1, 2,
        ]  # fmt: skip


def test_what_was_measured_is_not_measured_again(pretended, tmp_path, monkeypatch):
    real, left = adapters.measure, 6

    def interrupted(*arguments):
        nonlocal left
        if not (left := left - 1):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(adapters, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.main([])
    assert len(pretended) == 5
    assert len(results(tmp_path)["layouts"]["layout 3, rank 16"]["share"]) == 3
    monkeypatch.setattr(adapters, "measure", real)
    adapters.main([])
    assert len(pretended) == len(set(pretended)) == 2 + 3 * len(adapters.RACED)
    adapters.main([])
    assert len(pretended) == 2 + 3 * len(adapters.RACED)
