import dataclasses
from pathlib import Path

import pytest

from tests.conftest import needs_posix, refused
from utils.runs import prepare
from utils.settings import FULL, TINY, Settings, load_settings

FIELDS = {field.name: field.type for field in dataclasses.fields(Settings)}
FIELDS.pop("preset")
OTHERS = {"precision": "float16", "device": "cpu"}
OTHERS |= {"ppo_micro_batch_size": 32, "gae_lambda": 0.5}
# Plain values, and what they become
PLAIN = [("seed", 7.0, 7), ("ppo_episodes", 1.024e3, 1024), ("kl_coef", 1, 1.0)]
PLAIN += [("train_anyway", 1, True), ("train_anyway", False, False)]
PLAIN += [("positive_label", 5, "5"), ("negative_label", 2.5, "2.5")]
PLAIN += [("positive_label", True, "True"), ("missing_eos_score", -3, -3.0)]
PLAIN += [("model_name", "~/mine", str(Path.home() / "mine"))]


def test_the_presets_and_every_change():
    assert load_settings("full") == FULL and load_settings("tiny", {}) == TINY
    assert FULL.ppo_steps * FULL.ppo_rollout_size == FULL.ppo_episodes
    for name, kind in FIELDS.items():
        value = getattr(FULL, name)
        other = OTHERS.get(name, value * 2 if value else kind(3))
        changed = load_settings("full", {name: other})
        assert changed.changes == {name: other} and other != value
        assert type(getattr(changed, name)) is kind
    for name, value, becomes in PLAIN:
        found = getattr(load_settings("full", {name: value}), name)
        assert found == becomes and type(found) is type(becomes)


def test_the_tiny_world_moves_with_the_runs():
    moved = load_settings("tiny", {"runs_dir": "/a/b", "dataset_name": "mine.csv"})
    assert moved.model_name == "/a/b/tiny/world/model"
    assert moved.dataset_name == "mine.csv" and str(moved.folder) == "/a/b/tiny"
    assert moved.changes == {"dataset_name": "mine.csv", "runs_dir": "/a/b"}
    moved = load_settings("tiny", {"runs_dir": "/a/b"})
    assert moved.that_change("sft") == TINY.that_change("sft")  # it is the same world


WRONG = [
    ({"ppo_episode": 512}, "'ppo_episode'.*'ppo_episodes'"),
    ({"preset": "tiny"}, "no setting 'preset'"),
    ({"ppo_episodes": "512"}, "ppo_episodes must be a whole number.*'512'"),
    ({"ppo_episodes": 51.2}, "ppo_episodes must be a whole number.*51.2"),
    ({"ppo_episodes": 100}, r"ppo_episodes \(100\) .*multiple of ppo_rollout_size"),
    ({"ppo_micro_batch_size": 48}, r"ppo_minibatch_size.*micro_batch_size \(48"),
    ({"kl_coef": 0, "kl_target": 6}, "kl_coef must be above 0.*kl_target"),
    ({"ppo_lr": 0}, "ppo_lr must be above 0.*0"),
    ({"missing_eos_score": float("nan")}, "missing_eos_score must be a finite.*nan"),
    ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ({"gae_lambda": 1.5}, "gae_lambda must be from 0 to 1.*1.5"),
    ({"train_anyway": "yes"}, "train_anyway must be True or False.*'yes'"),
    ({"device": "cuda:1"}, "device.*auto.*cpu.*cuda.*mps.*'cuda:1'"),
]


@pytest.mark.faults
@pytest.mark.parametrize("changes, says", WRONG)
def test_bad_values_are_named(changes, says):
    refused(says, load_settings, "full", changes)


def test_what_artefacts_depend_on_is_said_in_one_place():
    found = {x: set(TINY.that_change(x)) for x in ("sft", "reward_model", "policy")}
    common = {"preset", "model_name", "dataset_name", "seed", "max_tokens"}
    common |= {"dataset_config", "text_column", "label_column", "positive_label"}
    common |= {"negative_label", "validation_split", "train_rows", "batch_size"}
    sft, rm = ({n for n in FIELDS if n.startswith(x)} for x in ("sft_", "rm_"))
    free = {"runs_dir", "device", "train_anyway"}
    free |= {"precision", "ppo_micro_batch_size"}
    assert found["sft"] == common | sft and found["reward_model"] == common | rm
    assert found["policy"] == {"preset", *FIELDS} - free


def test_the_first_cell_stands_above_the_shell(world, monkeypatch, capsys, tmp_path):
    """And what differs from the preset is printed."""
    names = {"model_name": str(world / "model"), "dataset_name": str(world / "dataset")}
    names["runs_dir"] = str(tmp_path)
    monkeypatch.setenv("RLHF_PRESET", "tiny")
    settings, _ = prepare("policy", "", {"kl_coef": 0.25, **names})
    assert settings == dataclasses.replace(TINY, kl_coef=0.25, **names)
    said = capsys.readouterr().out
    assert "preset: tiny" in said and "'kl_coef': 0.25" in said
    assert prepare("policy", "full", names)[0].preset == "full"
    refused("'tyni'.*'tiny'", prepare, "policy", "tyni")
    refused("'kl'", prepare, "policy", "", {"kl": 1})


@needs_posix
def test_writing_is_tried_before_anything_is_trained(world, tmp_path):
    """In a folder in which not even root may write."""
    (tmp_path / "tiny").symlink_to("/sys/kernel")
    names = {"model_name": str(world / "model"), "dataset_name": str(world / "dataset")}
    names["runs_dir"] = str(tmp_path)
    refused("cannot write into .*runs_dir", prepare, "sft", "tiny", names)
