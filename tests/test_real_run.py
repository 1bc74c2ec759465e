"""The tool that measures the series on a real model, with the runs pretended."""

import json
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import real_run
from utils.settings import load_settings
from utils.support.notebook import NOTEBOOKS
from utils.support.run import parse

LINKS = "[a](utils/x.py), [b](https://b.c), [d](#d)"
FIGURES_OF = {"1": "validation_perplexity", "2": "accuracy", "3": "kl"}


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that write what a run writes; what they were asked for."""
    monkeypatch.setattr(real_run, "ROOT", tmp_path)
    asked, threads = [], []
    monkeypatch.setattr(real_run.os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run_measured(command, env):
        threads.append(env.get("OMP_NUM_THREADS"))
        options = parse(command[3:])
        asked.append(options)
        (notebook,) = options.notebooks
        name = {v: k for k, v in NOTEBOOKS.items()}[notebook]
        folder = tmp_path / options.settings.folder
        artefact = folder / real_run.STAGES[int(name) - 1]
        artefact.mkdir(parents=True)
        says = f"*The outputs on this page are of {options.settings.seed}.*\n\n{LINKS}"
        streams = [
            new_output("stream", name=where, text=where)
            for where in ("stdout", "stderr")
        ]
        cells = [new_markdown_cell(says), new_code_cell("x](y)", outputs=streams)]
        nbformat.write(new_notebook(cells=cells), folder / notebook)
        figure = FIGURES_OF[name]
        metrics = {"after": {figure: options.settings.seed / 2}}
        if name == "3":
            steps = [{"approx_kl": 0.25, "optimizer_steps": n} for n in (3, 1, 4, 3)]
            metrics |= {"before": {figure: 1.0}, "history": steps}
        (artefact / "metrics.json").write_text(json.dumps(metrics))
        return 0, {"seconds": 1.0, "peak_gib": 2.0}

    monkeypatch.setattr(real_run, "run_measured", run_measured)
    return SimpleNamespace(asked=asked, threads=threads)


def test_each_seed_is_run_once_and_collected(pretended, tmp_path):
    asked = pretended.asked
    arguments = ["some/model", "--seeds", "2", "--set", "train_rows=100"]
    real_run.main(arguments)
    wanted = {"RLHF_MODEL_NAME": "some/model", "RLHF_TRAIN_ROWS": "100"}
    for options, seed in zip(asked, [42] * 3 + [43] * 3, strict=True):
        own = {"RLHF_SEED": str(seed), "RLHF_RUNS_DIR": f"runs/real-run/{seed}"}
        assert options.settings == load_settings("full", wanted | own)
    folder = tmp_path / "docs/real-run"
    found = json.loads((folder / "results.json").read_text())
    assert found["seeds"] == [42, 43]
    assert found["changes"] == ["model_name=some/model", "train_rows=100"]
    assert found["figures"] == {
        "validation_perplexity": {"after": [21.0, 21.5]},
        "accuracy": {"after": [21.0, 21.5]},
        "kl": {"before": [1.0, 1.0], "after": [21.0, 21.5]},
    }
    assert found["first_approx_kl"] == [0.25, 0.25]
    assert found["ended_early"] == [3, 3]  # of 2 epochs of 128 / 64
    assert list(found["seconds"]) == list(real_run.STAGES)
    assert all(len(each) == 2 for each in found["seconds"].values())
    page = (folder / "README.md").read_text()
    assert "on SST-2. Seeds: 2; of" in page
    assert "| SFT: validation perplexity |  | 21.25 (21.00 to 21.50) |" in page
    kl = "| KL to the reference [nats per response] | 1.00 | 21.25 (21.00 to 21.50) |"
    assert kl in page
    assert "policy by 0.250 nats" in page and "ended early: 6." in page
    command = "    python -m tools.real_run some/model --seeds 2 --set train_rows=100\n"
    assert page.endswith(command)
    for notebook in list(NOTEBOOKS.values())[:3]:
        first, second = nbformat.read(folder / notebook, 4).cells
        assert first.source == (
            f"*A real model's run, by `{command.strip()}`.*\n\n"
            "[a](../../utils/x.py), [b](https://b.c), [d](#d)"
        )
        assert second.source == "x](y)"
        assert [output.text for output in second.outputs] == ["stdout"]
    # what is there is not run again, what is not whole is
    real_run.main(arguments)
    assert len(asked) == 6
    (tmp_path / "runs/real-run/43/full/sft-cost.json").unlink()
    (tmp_path / "runs/real-run/43/full/sft/metrics.json").unlink()
    (tmp_path / "runs/real-run/43/full/sft").rmdir()
    real_run.main(arguments)
    assert len(asked) == 7 and asked[-1].settings.seed == 43
    # and nothing is reported of a run with other settings
    with pytest.raises(SystemExit, match="was made with .*train_rows=100.* delete"):
        real_run.main([*arguments[:-1], "train_rows=200"])
    assert len(asked) == 7
    assert set(pretended.threads) == {None}


def test_seeds_at_once_share_the_cores(pretended):
    real_run.main(["some/model", "--jobs", "3"])
    seeds = [options.settings.seed for options in pretended.asked]
    assert sorted(seeds) == [42] * 3 + [43] * 3 + [44] * 3
    assert pretended.threads == ["1"] * 9


def test_the_reward_model_learns_from_fewer_phrases_too(pretended, tmp_path):
    arguments = ["some/model", "--seeds", "1", "--set", "train_rows=100", "--curve"]
    real_run.main([*arguments, "25,5000,0"])
    *whole, few, more, all_of_them = pretended.asked
    assert len(whole) == 3
    for options, rows in ((few, 25), (more, 5000), (all_of_them, 0)):
        own = {"RLHF_SEED": "42", "RLHF_RUNS_DIR": f"runs/real-run/42-{rows}"}
        own |= {"RLHF_MODEL_NAME": "some/model", "RLHF_TRAIN_ROWS": str(rows)}
        assert options.settings == load_settings("full", own)
        assert options.notebooks == [NOTEBOOKS["2"]]
    folder = tmp_path / "docs/real-run"
    found = json.loads((folder / "results.json").read_text())
    assert found["curve"] == {"25": 21.0, "5000": 21.0, "0": 21.0}
    page = (folder / "README.md").read_text()
    assert "2100.0% from 25, 2100.0% from 5,000, 2100.0% from all." in page
    assert "some/model --seeds 1 --curve 25,5000,0 --set train_rows=100\n" in page


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["m", "--seeds", "0"], "got --seeds 0"),
        (["m", "--jobs", "0"], "got --jobs 0"),
        (["m", "--set", "train_row=5"], "the nearest is 'train_rows'"),
        (["m", "--set", "train_rows=many"], "must be a whole number, got 'many'"),
        (["m", "--set", "ppo_episodes=100"], "must be a multiple of ppo_rollout_size"),
        (["m", "--curve", "10,x"], "must be a whole number, got 'x'"),
        (["m", "--curve", "10,-1"], "must be 0 or more, got -1"),
        (["m", "--set", "seed=7"], "--set cannot change seed"),
    ],
)
def test_what_cannot_be_run_is_said_before(pretended, capsys, arguments, says):
    with pytest.raises(SystemExit):
        real_run.main(arguments)
    assert says in capsys.readouterr().err and not pretended.asked


def test_what_a_run_took_is_measured():
    """That of its children too: one that holds a GiB and computes for a while."""
    code = "import time; x = b'x' * 2**30; t = time.process_time()\n"
    code += "while time.process_time() - t < 0.3: pass\n"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    failed, spent = real_run.run_measured([sys.executable, "-c", nested], {})
    assert not failed and 1 <= spent["peak_gib"] < 1.1
    assert spent["seconds"] >= 0.3
    failed, _ = real_run.run_measured([sys.executable, "-c", "raise SystemExit(3)"], {})
    assert failed == 3


def test_a_notebook_that_fails_ends_it(pretended, monkeypatch):
    monkeypatch.setattr(real_run, "run_measured", lambda *_: (1, {}))
    with pytest.raises(SystemExit, match="seed 42 stopped in notebook 1"):
        real_run.main(["m"])
