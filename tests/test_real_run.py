"""The tool that measures the series on a real model, with the runs pretended."""

import json
import subprocess

import pytest

from tools import real_run
from utils.settings import load_settings
from utils.support.notebook import NOTEBOOKS
from utils.support.run import parse


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that write what a run writes; what they were asked for."""
    monkeypatch.setattr(real_run, "ROOT", tmp_path)
    asked = []

    def run(command, cwd):
        options = parse(command[3:])
        asked.append(options)
        (notebook,) = options.notebooks
        name = {v: k for k, v in NOTEBOOKS.items()}[notebook]
        folder = tmp_path / options.settings.folder
        artefact = folder / real_run.STAGES[int(name) - 1]
        artefact.mkdir(parents=True)
        (folder / notebook).write_text(f"{notebook} of {options.settings.seed}")
        metrics = {"after": {f"figure {name}": options.settings.seed / 2}}
        if name == "3":
            steps = [{"approx_kl": 0.25, "optimizer_steps": n} for n in (7, 3, 8, 7)]
            metrics |= {"before": {"figure 3": 1.0}, "history": steps}
        (artefact / "metrics.json").write_text(json.dumps(metrics))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_run.subprocess, "run", run)
    return asked


def test_each_seed_is_run_once_and_collected(pretended, tmp_path):
    arguments = ["some/model", "--seeds", "2", "--set", "train_rows=100"]
    real_run.main(arguments)
    wanted = {"RLHF_MODEL_NAME": "some/model", "RLHF_TRAIN_ROWS": "100"}
    for options, seed in zip(pretended, [42] * 3 + [43] * 3, strict=True):
        own = {"RLHF_SEED": str(seed), "RLHF_RUNS_DIR": f"runs/real-run/{seed}"}
        assert options.settings == load_settings("full", wanted | own)
    folder = tmp_path / "docs/real-run"
    found = json.loads((folder / "results.json").read_text())
    assert found["seeds"] == [42, 43]
    assert found["changes"] == ["model_name=some/model", "train_rows=100"]
    assert found["figures"] == {
        "figure 1": {"after": [21.0, 21.5]},
        "figure 2": {"after": [21.0, 21.5]},
        "figure 3": {"before": [1.0, 1.0], "after": [21.0, 21.5]},
    }
    assert found["first_approx_kl"] == [0.25, 0.25]
    assert found["ended_early"] == [3, 3]  # of 4 epochs of 128 / 64
    assert list(found["seconds"]) == list(real_run.STAGES)
    assert all(len(each) == 2 for each in found["seconds"].values())
    for notebook in list(NOTEBOOKS.values())[:3]:
        assert (folder / notebook).read_text() == f"{notebook} of 42"
    # what is there is not run again, what is not whole is
    real_run.main(arguments)
    assert len(pretended) == 6
    (tmp_path / "runs/real-run/43/full/sft-cost.json").unlink()
    (tmp_path / "runs/real-run/43/full/sft/metrics.json").unlink()
    (tmp_path / "runs/real-run/43/full/sft").rmdir()
    real_run.main(arguments)
    assert len(pretended) == 7 and pretended[-1].settings.seed == 43
    # and nothing is reported of a run with other settings
    with pytest.raises(SystemExit, match="was made with .*train_rows=100.* delete"):
        real_run.main([*arguments[:-1], "train_rows=200"])
    assert len(pretended) == 7


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["m", "--seeds", "0"], "got --seeds 0"),
        (["m", "--set", "train_row=5"], "the nearest is 'train_rows'"),
        (["m", "--set", "train_rows=many"], "must be a whole number, got 'many'"),
        (["m", "--set", "ppo_episodes=100"], "must be a multiple of ppo_rollout_size"),
        (["m", "--set", "seed=7"], "--set cannot change seed"),
    ],
)
def test_what_cannot_be_run_is_said_before(pretended, capsys, arguments, says):
    with pytest.raises(SystemExit):
        real_run.main(arguments)
    assert says in capsys.readouterr().err and not pretended


def test_a_notebook_that_fails_ends_it(pretended, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(real_run.subprocess, "run", lambda command, cwd: failed)
    with pytest.raises(SystemExit, match="seed 42 stopped in notebook 1"):
        real_run.main(["m"])
