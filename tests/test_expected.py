"""The expected figures, and how a run is held against them."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

from tools import expected as measuring
from utils.evaluation import FIGURES, figures_table
from utils.models import load_causal_lm
from utils.settings import FULL, TINY
from utils.support import expected as reading
from utils.support.expected import expected
from utils.support.run import EARLIER_FIGURES, parse


def test_what_is_expected_is_that_of_the_preset():
    found = expected(TINY)
    kept = json.loads(reading.FILE.read_text())
    assert kept["seeds"] >= 10
    assert set(FIGURES) | set(EARLIER_FIGURES) <= set(found)
    assert expected(dataclasses.replace(TINY, seed=7, runs_dir="x")) == found


def test_other_settings_and_a_gpu_expect_nothing(monkeypatch):
    assert expected(FULL) == {}
    assert expected(dataclasses.replace(TINY, kl_coef=0.2)) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert expected(TINY) == {}


def test_a_seed_is_run_with_the_presets_own_settings(world, tmp_path, monkeypatch):
    """Whatever the shell has set; and a run that fails ends the command, by name."""
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    monkeypatch.setenv("RLHF_KL_COEF", "0.2")
    calls = []

    def run(command, env, **options):
        calls.append((command, env))
        folder = tmp_path / "runs/expected/3/tiny"
        folder.mkdir(parents=True, exist_ok=True)
        found = {"sft": {"after": {"loss": 1.5}}, "policy": {"after": {"kl": 2.0}}}
        (folder / "metrics.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=len(calls) - 1, stderr="KeyError: the cause")

    monkeypatch.setattr(measuring.subprocess, "run", run)
    monkeypatch.setattr(measuring.tiny_world, "build_world", lambda folder: world)
    monkeypatch.setitem(measuring.tiny_world.PRETRAINING, "steps", 1)
    assert measuring.measure(3, keep=True) == {"loss": 1.5, "kl": 2.0}
    (command, env), *_ = calls
    monkeypatch.delenv("RLHF_KL_COEF")
    options = parse([*command[3:]])
    assert options.settings.seed == 3 and options.settings.kl_coef == TINY.kl_coef
    assert options.settings.model_name == "runs/expected/3/model"
    assert "RLHF_KL_COEF" not in env
    assert env.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
    # a model of its own, with the world's tokenizer
    lm = load_causal_lm(str(tmp_path / "runs/expected/3/model"))
    assert (
        lm.config.vocab_size == load_causal_lm(str(world / "model")).config.vocab_size
    )
    assert measuring.measure(3, keep=True) == {"loss": 1.5, "kl": 2.0}
    assert len(calls) == 1  # it was there
    with pytest.raises(SystemExit, match="(?s)seed 3 failed.*KeyError: the cause"):
        measuring.measure(3, keep=False, threads=5)
    assert calls[-1][1]["OMP_NUM_THREADS"] == "5"


def test_mean_and_deviation_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "FILE", tmp_path / "measuring.json")
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    runs = {0: {"kl": 1.0, "length": 7.0}, 1: {"kl": 3.0, "length": 7.0}}
    asked = []

    def measure(seed, keep, threads):
        asked.append((seed, keep, threads))
        return runs[seed]

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(measuring.torch, "set_num_threads", asked.append)
    measuring.main(["--seeds", "2"])
    measuring.main(["--seeds", "2", "--jobs", "3", "--keep"])
    ones = [(0, False, 0), (1, False, 0)]  # 0: as many threads as there are
    assert sorted(asked[:2]) == ones and asked[2] == 2
    assert sorted(asked[3:]) == [(0, True, 2), (1, True, 2)]
    assert expected(TINY) == {
        "kl": (2.0, pytest.approx(2**0.5)),
        "length": (7, 0),
    }
    for option, value in (("--seeds", "1"), ("--jobs", "0")):
        with pytest.raises(SystemExit):
            measuring.main([option, value])
        assert f"got {option} {value}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kl, eos_rate, outside",
    [
        (2.9, 1.0, []),
        (3.1, 1.0, ["kl"]),
        (0.9, 1.0, ["kl"]),
        # one response of 256 without EOS is no news, two are
        (2.0, 255 / 256, []),
        (2.0, 254 / 256, ["eos_rate"]),
    ],
)
def test_what_lies_outside_is_marked(kl, eos_rate, outside):
    known = {"kl": (2.0, 0.25), "eos_rate": (1.0, 0.0)}
    table = figures_table({}, {"kl": kl, "eos_rate": eos_rate}, known)
    lines = dict(zip(("kl", "eos_rate"), table.splitlines()[1:], strict=True))
    assert "2.00 ± 1.00" in lines["kl"]
    assert [k for k, line in lines.items() if line.endswith("outside")] == outside
