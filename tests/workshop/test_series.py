"""Whole runs of the series over several seeds, which are pretended."""

import json
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from practice import tiny_world
from utils.__main__ import parse
from utils.models import load_causal_lm
from utils.settings import STAGES, TINY, load_settings
from workshop import series


def test_a_seed_is_run_where_it_stopped(tmp_path, monkeypatch):
    """And no stage of it again; the figures are those of all stages."""
    asked, broken = [], ["policy"]

    def run(command, **_):
        ((file, (_, settings)),) = parse(command[3:])[0].items()
        stage = STAGES[int(file.name[0]) - 1]
        if stage in broken:
            broken.clear()
            return SimpleNamespace(returncode=1, stderr="KeyError: the cause")
        asked.append((stage, settings))
        metrics = {"before": {}, "after": {f"of {stage}": settings.seed}}
        metrics["history"] = [{"approx_kl": 0.25}, {"approx_kl": 0.5}]
        (folder := tmp_path / settings.folder / stage).mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(series, "ROOT", tmp_path)
    monkeypatch.setattr(series.subprocess, "run", run)
    settings = load_settings("full", {"train_rows": 100, "model_name": "some/model"})
    with pytest.raises(RuntimeError, match="(?s)seed 42 failed.*KeyError: the cause"):
        series.whole_run(settings, 42, "made")
    for _ in range(2):
        found = series.whole_run(settings, 42, "made")
        own = settings.changes | {"runs_dir": "made/42"}
        assert asked == [(x, load_settings("full", own)) for x in STAGES]
    assert found["after"] == {f"of {stage}": 42 for stage in STAGES}
    assert found["first_approx_kl"] == 0.25
    assert found["seconds"].keys() == found["peak_gib"].keys() == set(STAGES)


def test_the_tiny_preset_has_a_model_for_each_seed(world, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_world.PRETRAINING, "steps", 1)
    monkeypatch.setattr(series.tiny_world, "build_world", lambda folder: world)
    monkeypatch.setattr(series, "ROOT", tmp_path)
    monkeypatch.setattr(series, "whole_run", lambda *_: None)
    for seed in (0, 1):
        series.tiny_run(TINY, seed, "made")
    models = [tmp_path / f"made/{seed}/tiny/world/model" for seed in (0, 1)]
    models = [load_causal_lm(str(x)) for x in (*models, world / "model")]
    one, other, own = (lm.lm_head.weight for lm in models)
    assert not one.equal(other) and not other.equal(own) and not own.equal(one)


def test_mean_and_deviation_over_the_seeds():
    runs = lambda *_: {"tiny": {"after": {"kl": [0.25, 0.5, 0.9]}}}  # noqa: E731
    runs.folder = "made"
    expected = [0.55, (0.3**2 + 0.05**2 + 0.35**2) ** 0.5 / 2**0.5]
    assert series.expected(runs)["figures"]["kl"] == pytest.approx(expected)


def test_an_executed_notebook_as_it_is_shown():
    links = "[a](utils/x.py), [b](https://b.c), [d](#d)"
    title = f"*The outputs on this page are of 42.*\n\n{links}"
    shown = new_notebook(cells=[new_markdown_cell(title), new_code_cell("x](y)")])
    first, second = series.as_shown(shown, "python -m x").cells
    links = "[a](../../utils/x.py), [b](https://b.c), [d](#d)"
    assert first.source == f"*A real model's run, by `python -m x`.*\n\n{links}"
    assert second.source == "x](y)"
