"""The tool that trains adapters on a real model, with the stages pretended, or tiny."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from tests.conftest import ROOT
from tools import real_adapters
from tools.real_run import RUNS
from utils.settings import FULL, TINY

CHANGES = ["model_name=some/model", "train_rows=100"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A run of full fine-tuning, and stages that write what stages write."""
    monkeypatch.setattr(real_adapters, "ROOT", tmp_path)
    (tmp_path / "docs/real-run").mkdir(parents=True)
    full = tmp_path / RUNS / "42/full"
    write(full / "policy-cost.json", {"changes": CHANGES, "peak_gib": 9.0})
    write(full / "reward_model/metrics.json", {"after": {"accuracy": 0.9}})
    history = [{"score": n / 10, "kl": n / 3, "other": 0} for n in range(4)]
    metrics = {"history": history, "seconds": 100.0}
    metrics |= {"before": {"kl": 0.0}, "after": {"kl": 4.0}}
    write(full / "policy/metrics.json", metrics)
    asked = []

    def run_measured(command, environment):
        stage = command[command.index("--stage") + 1]
        asked.append((stage, command, environment["OMP_NUM_THREADS"]))
        place = tmp_path / "runs/real-adapters/42/full/adapters"
        if stage == "reward":
            found = {"after": {"accuracy": 0.8}}
            write(place / "on-the-sft-model/metrics.json", found)
        elif stage == "policy":
            found = {"ppo_seconds": 50.0, "moved": 0, "history": history[:2]}
            write(place / "policy/metrics.json", found)
            (place / "policy/adapter_model.safetensors").write_bytes(b"12345")
        else:
            found = {"before": {"kl": 0.0}, "after": {"kl": 1 / 3}}
            write(place / "policy/figures.json", found)
        return 0, {"seconds": 7.0, "peak_gib": 3.0}

    monkeypatch.setattr(real_adapters, "run_measured", run_measured)
    return asked


def test_the_stages_are_run_once_and_compared(pretended, tmp_path):
    real_adapters.main(["--set", "ppo_episodes=256"])
    assert [stage for stage, *_ in pretended] == ["reward", "policy", "judge"]
    assert all(threads == "1" for *_, threads in pretended)
    assert all("ppo_episodes=256" in command for _, command, _ in pretended)
    found = json.loads((tmp_path / real_adapters.RESULTS).read_text())
    assert found["episodes"] == 256 and found["full"]["episodes"] == 512
    assert found["accuracy"] == 0.8 and found["full"]["accuracy"] == 0.9
    assert found["after"]["kl"] == 0.3333 and found["full"]["after"]["kl"] == 4
    assert found["history"] == {"score": [0.0, 0.1], "kl": [0.0, 0.3333]}
    assert found["cost"]["policy"] == {"seconds": 7.0, "peak_gib": 3.0}
    assert found["full"]["peak_gib"] == 9.0 and found["adapter_bytes"] == 5
    assert found["rates"] == {"rm_lr": 1.667e-4, "ppo_lr": 6e-4}
    # what is there is not done again, what is not there is
    real_adapters.main(["--set", "ppo_episodes=256"])
    assert len(pretended) == 3
    (tmp_path / "runs/real-adapters/42/full/judge-cost.json").unlink()
    real_adapters.main(["--set", "ppo_episodes=256"])
    assert [stage for stage, *_ in pretended[3:]] == ["judge"]


def test_both_begin_with_the_settings_of_full_fine_tuning(pretended):
    theirs, ours = real_adapters.settings_of(42, {"ppo_episodes": 256})
    assert theirs.model_name == "some/model" and theirs.train_rows == 100
    assert theirs.folder == RUNS / "42/full"
    same = dataclasses.replace(
        ours,
        **{
            name: getattr(theirs, name)
            for name in ("ppo_episodes", "runs_dir", "checkpoint_every", "rm_lr")
        },
        ppo_lr=theirs.ppo_lr,
    )
    assert same == theirs
    assert ours.ppo_lr == 10 * FULL.ppo_lr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--seed", "7"], "there is no runs/real-run/7/full/policy-cost.json; run "),
        (["--set", "ppo_episode=1"], "the nearest is 'ppo_episodes'"),
        (["--set", "ppo_episodes=100"], "must be a multiple of ppo_rollout_size"),
    ],
)
def test_what_cannot_be_run_is_said_before(pretended, capsys, arguments, says):
    with pytest.raises(SystemExit):
        real_adapters.main(arguments)
    assert says in capsys.readouterr().err and not pretended


def test_a_stage_that_fails_ends_it(pretended, monkeypatch):
    monkeypatch.setattr(real_adapters, "run_measured", lambda *_: (1, {}))
    with pytest.raises(SystemExit, match="stopped in the stage reward"):
        real_adapters.main([])


def test_prompts_of_other_settings_are_refused():
    three = SimpleNamespace(reference=None, score=None, eos_id=0)
    three.prompts_of = lambda step: [[3]] * TINY.ppo_rollout_size
    half = dataclasses.replace(TINY, ppo_rollout_size=TINY.ppo_rollout_size // 2)
    with pytest.raises(ValueError, match="256 prompts, but ppo_rollout_size is 128;"):
        real_adapters.train_checked(three, None, half, None, "reward")


@pytest.mark.slow
def test_the_stages_train_one_base_in_the_tiny_world(series, tmp_path):
    """For real, with few rows and rollouts: nothing of the base moves."""
    folder, _ = series
    for name in ("sft", "reward_model"):
        shutil.copytree(folder / name, tmp_path / "runs/tiny" / name)
    theirs = dataclasses.replace(TINY, runs_dir=str(tmp_path / "runs"))
    ours = dataclasses.replace(
        theirs,
        runs_dir=str(tmp_path / "ours"),
        ppo_episodes=512,
        checkpoint_every=1,
    )
    device = torch.device("cpu")
    real_adapters.train_reward(theirs, ours, device)
    real_adapters.train_policy(theirs, ours, device)
    real_adapters.judge(theirs, ours, device)
    place = tmp_path / "ours/tiny/adapters"
    reward = json.loads((place / "on-the-sft-model/metrics.json").read_text())
    assert reward["after"]["accuracy"] > 0.8 and reward["validation_rows"] == 800
    policy = json.loads((place / "policy/metrics.json").read_text())
    assert policy["moved"] == 0 and len(policy["history"]) == 2
    assert policy["history"][0]["kl"] == 0
    figures = json.loads((place / "policy/figures.json").read_text())
    assert figures["before"]["kl"] == 0 != figures["after"]["kl"]
    after = figures["after"]
    assert after["objective"] == after["score"] - theirs.kl_coef * after["kl"]
    whole = json.loads((folder / "policy/metrics.json").read_text())
    assert figures["before"]["score"] == pytest.approx(whole["before"]["score"])
    with safe_open(place / "policy/adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
        assert any(file.get_tensor(k).abs().max() > 0 for k in keys if "lora_B" in k)
    assert not (ROOT / "ours").exists()
