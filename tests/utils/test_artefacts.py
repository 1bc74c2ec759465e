"""Artefacts: whole or not there, and taken up only where their settings match."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import refused
from tests.small import small_lm, small_tokenizer
from utils.__main__ import parse
from utils.data import load_tokenizer
from utils.models import RewardModel, load_causal_lm
from utils.runs import find_artefacts, save_artefact
from utils.settings import load_settings

pytestmark = pytest.mark.faults
NAMES, METRICS = ("sft", "reward_model"), {"before": {}, "after": {"loss": 1.5}}


@pytest.fixture
def saved(tmp_path):
    settings = load_settings("tiny", {"runs_dir": str(tmp_path)})
    made = (small_lm(), RewardModel(small_lm(seed=1).base_model))
    for name, model in zip(NAMES, made, strict=True):
        save_artefact(settings, name, model, small_tokenizer(), METRICS)
    return settings


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_saved_model_loads_with_plain_transformers(saved, umask):
    """And whoever may read the folder may read its files: safetensors made them 600."""
    lm, before = small_lm(), os.umask(umask)
    try:
        folder = save_artefact(saved, "sft", lm, small_tokenizer(), METRICS)
    finally:
        os.umask(before)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    torch.testing.assert_close(reloaded.state_dict(), lm.state_dict(), atol=0, rtol=0)
    assert load_tokenizer(str(folder)).get_vocab() == small_tokenizer().get_vocab()
    read = {p.stem: json.loads(p.read_text()) for p in folder.glob("*s.json")}
    assert read["settings"].pop("ingredients")
    assert read == {"metrics": METRICS, "settings": dataclasses.asdict(saved)}
    assert {p.name for p in saved.folder.iterdir()} == set(NAMES)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~umask}


def test_a_missing_artefact_names_both_ways_out(saved):
    """The command knows nothing of the notebook's CHANGES: it is told what differs."""
    changes = {"sft_epochs": 2, "dataset_name": "a b.csv", "kl_coef": 0.5}
    wanted = load_settings("tiny", {"runs_dir": saved.runs_dir, **changes})
    shutil.rmtree(saved.folder / "sft")
    assert find_artefacts(saved, "reward_model") == [str(saved.folder / "reward_model")]
    with pytest.raises(FileNotFoundError, match="USE_DRIVE = True") as caught:
        find_artefacts(wanted, "sft")
    command = str(caught.value).split("!python -m utils ")[1]
    ((name, (_, settings)),) = parse(shlex.split(command))[0].items()
    assert Path(name).name == "1-SFT.ipynb" and settings == wanted


def test_a_full_disk_leaves_the_old_model_and_nothing_else(saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    says = r"^cannot save .*sft \(OSError: .*No space left.*\); make room[^\n]*$"
    with pytest.raises(OSError, match=says):
        save_artefact(saved, "sft", small_lm(seed=3), small_tokenizer(), METRICS)
    assert {p.name for p in saved.folder.iterdir()} == set(NAMES)
    weight = load_causal_lm(*find_artefacts(saved, "sft")).lm_head.weight
    assert torch.equal(weight, small_lm().lm_head.weight.float())


TAKEN_UP = [  # other settings, and what is said; nothing: it is taken up
    ({"ppo_lr": 1.0, "precision": "float32"}, None),  # what neither depends on
    ({"rm_epochs": 2}, "reward_model was made with .*'rm_epochs': 1.* notebook 2"),
    ({"seed": 7, "max_tokens": 9}, "sft was .*'seed': 42.*: 66}.* add .* CHANGES"),
]


@pytest.mark.parametrize("changes, says", TAKEN_UP)
def test_only_artefacts_of_the_same_settings_are_taken_up(saved, changes, says):
    settings = dataclasses.replace(saved, **changes)
    folders = [str(saved.folder / name) for name in NAMES]
    file = saved.folder / "sft/settings.json"  # with a setting that has gone since
    file.write_text(json.dumps(json.loads(file.read_text()) | {"log_to": ""}))
    stops = pytest.raises(ValueError, match=says)
    with stops if says else contextlib.nullcontext():
        assert find_artefacts(settings, *NAMES) == folders
    assert all(map(os.path.exists, folders))  # another one's are not broken ones


@pytest.mark.parametrize("name", ["own.csv", "own"])
def test_an_artefact_of_other_data_or_models_is_not_taken_up(saved, tmp_path, name):
    """With the very same settings: a file of one's own was edited, a model trained."""
    own = tmp_path / name / "train.json" if name == "own" else tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("sentence,label\n")
    settings = dataclasses.replace(saved, dataset_name=str(tmp_path / name))
    given = small_lm(), small_tokenizer(), METRICS
    for name in (*NAMES, "policy"):
        save_artefact(settings, name, *given)
    own.with_name("state.json").write_text("saved again")  # and nothing has changed
    assert find_artefacts(settings, *NAMES, "policy")
    save_artefact(settings, "sft", small_lm(seed=1), *given[1:])
    assert find_artefacts(settings, *NAMES)
    says = "policy was made from other data, or .* anew since; run notebook 3"
    refused(says, find_artefacts, settings, "policy")
    own.write_text("sentence,label\nfine,1\n")
    refused("sft was made from other data", find_artefacts, settings, "sft")


STEPS = [(PreTrainedTokenizerFast, "save_pretrained"), (Path, "rename")]


def test_an_interrupted_replacement_leaves_one_of_both(saved, monkeypatch):
    """Interrupted at each step that touches the disk, until it gets through."""

    def steps(real):
        def step(*arguments, **options):
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return step

    for last in range(1, 20):
        calls, new = [], small_lm(seed=last)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for place, name in (*STEPS, (shutil, "rmtree")):
                patch.setattr(place, name, steps(getattr(place, name)))
            save_artefact(saved, "sft", new, small_tokenizer(), {"seed": last})
        folder = Path(*find_artefacts(saved, "sft"))
        seed = json.loads((folder / "metrics.json").read_text()).get("seed", 0)
        found, expected = load_causal_lm(folder), small_lm(seed=seed)
        assert torch.equal(found.lm_head.weight, expected.lm_head.weight.float())
        if len(calls) < last:
            break
    assert seed == last >= 6
    assert {p.name for p in saved.folder.iterdir()} == set(NAMES)
