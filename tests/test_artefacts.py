"""Artefacts: whole or not there, and taken up only where their settings match."""

import dataclasses
import itertools
import json
import multiprocessing
import random
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import needs_posix
from tests.test_rollout import small_lm
from utils.data import load_tokenizer
from utils.models import RewardModel
from utils.settings import TINY
from utils.support import run
from utils.support.artefacts import (
    find_artefacts,
    replacing,
    save_artefact,
    set_aside,
    write_text,
)

pytestmark = pytest.mark.faults
METRICS = {"before": {"loss": 2.0}, "after": {"loss": 1.5}}


@pytest.fixture
def settings(tmp_path):
    return dataclasses.replace(TINY, runs_dir=str(tmp_path))


@pytest.fixture
def saved(settings, world):
    """Settings, with both artefacts that notebook 3 needs."""
    tokenizer = load_tokenizer(str(world / "model"))
    save_artefact(settings, "sft", small_lm(), tokenizer, METRICS)
    reward_model = RewardModel(small_lm(seed=1).base_model)
    save_artefact(settings, "reward_model", reward_model, tokenizer, METRICS)
    return settings


def test_a_saved_model_loads_with_plain_transformers(saved, world):
    lm, folder = small_lm().eval(), saved.folder / "sft"
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.tensor([[3, 4, 5, 2]])
    for name, weight in lm.named_parameters():
        assert torch.equal(weight, reloaded.get_parameter(name))
    # The same weights elsewhere in memory may be added up in another order
    torch.testing.assert_close(lm(ids).logits, reloaded(ids).logits, atol=1e-9, rtol=0)
    words = load_tokenizer(str(world / "model")).get_vocab()
    assert load_tokenizer(str(folder)).get_vocab() == words
    assert json.loads((folder / "metrics.json").read_text()) == METRICS
    found = json.loads((folder / "settings.json").read_text())
    assert found == dataclasses.asdict(saved)
    assert {p.name for p in saved.folder.iterdir()} == {"sft", "reward_model"}


def test_a_missing_artefact_names_both_ways_out(settings, saved):
    shutil.rmtree(settings.folder / "reward_model")
    with pytest.raises(FileNotFoundError, match="--only 2 --preset tiny"):
        find_artefacts(settings, "sft", "reward_model")
    assert find_artefacts(settings, "sft") == [str(settings.folder / "sft")]
    shutil.rmtree(settings.folder / "sft")
    with pytest.raises(FileNotFoundError) as error:
        find_artefacts(settings, "sft", "reward_model")
    assert "USE_DRIVE = True" in str(error.value)
    assert "!python -m utils --only 1,2 --preset tiny" in str(error.value)


@pytest.mark.parametrize(
    "changes, which",
    [
        ({}, None),
        # what the two models do not depend on
        ({"ppo_lr": 1.0, "kl_coef": 3.0, "max_new_tokens": 7, "eval_prompts": 2}, None),
        ({"precision": "float32"}, None),  # what the guards advise; weights are float32
        ({"sft_lr": 0.25}, "sft was made with sft_lr 0.001 instead of 0.25"),
        ({"rm_epochs": 2}, "reward_model was made with rm_epochs 1 instead of 2"),
        ({"seed": 7, "max_tokens": 9}, "with seed 42 instead of 7 and max_tokens 66"),
        ({"model_name": "gpt2-medium"}, "model_name 'runs/tiny/world/model' instead"),
        ({"dataset_name": "imdb"}, "dataset_name 'runs/tiny/world/dataset' instead of"),
        (
            {"sft_batch_size": 8},
            "add {'sft_batch_size': 32} to CHANGES in",
        ),
        ({"rm_lr": 0.5}, "run notebook 2 again"),
    ],
)
def test_only_artefacts_of_the_same_settings_are_taken_up(saved, changes, which):
    settings = dataclasses.replace(saved, **changes)
    if which is None:
        folders = [str(saved.folder / "sft"), str(saved.folder / "reward_model")]
        assert find_artefacts(settings, "sft", "reward_model") == folders
        return
    with pytest.raises(ValueError, match=which):
        find_artefacts(settings, "sft", "reward_model")
    assert (saved.folder / "sft").exists()  # it is another one's, not a broken one


def test_the_command_for_a_missing_model_makes_the_one_that_is_wanted(settings):
    """It knows nothing of the notebook's CHANGES, so it is told what differs."""
    wanted = dataclasses.replace(settings, sft_epochs=2, dataset_name="a b.csv")
    with pytest.raises(FileNotFoundError) as caught:
        find_artefacts(wanted, "sft", "reward_model")
    command = str(caught.value).split("!python -m utils ")[1]
    options = run.parse(shlex.split(command))
    assert [name[0] for name in options.notebooks] == ["1", "2"]
    assert options.settings == wanted


def test_an_artefact_from_before_a_setting_existed(saved):
    file = saved.folder / "sft" / "settings.json"
    then = json.loads(file.read_text())
    del then["text_column"], then["validation_share"]
    file.write_text(json.dumps(then))
    assert find_artefacts(saved, "sft") == [str(saved.folder / "sft")]
    other = dataclasses.replace(saved, text_column="review")
    with pytest.raises(ValueError, match="text_column 'sentence' instead of 'review'"):
        find_artefacts(other, "sft")


def test_an_artefact_of_another_preset_is_refused(saved):
    saved.folder.rename(saved.folder.with_name("full"))
    full = dataclasses.replace(saved, preset="full")
    with pytest.raises(ValueError, match="preset 'tiny' instead of 'full'") as error:
        find_artefacts(full, "sft", "reward_model")
    assert "'preset'" not in str(error.value)  # that is no way out of it


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, file, spoil",
    [
        ("sft", "model.safetensors", cut),
        ("reward_model", "reward_head.safetensors", cut),
        ("sft", "model.safetensors", lambda file: file.unlink()),
        ("sft", "settings.json", cut),
        ("sft", "settings.json", lambda file: file.unlink()),
        ("reward_model", "metrics.json", lambda file: file.write_text("")),
        ("sft", "model.safetensors", lambda file: file.write_text("version 1")),
    ],
)
def test_a_damaged_artefact_is_named_and_set_aside(saved, survived, name, file, spoil):
    spoil(saved.folder / name / file)
    left = {p.name: p.read_bytes() for p in (saved.folder / name).iterdir()}
    with pytest.raises(ValueError) as error:
        find_artefacts(saved, "sft", "reward_model")
    number = {"sft": 1, "reward_model": 2}[name]
    assert f"{saved.folder / name} is damaged (" in str(error.value)
    assert f"renamed to {name}.aside-1; run notebook {number} again" in str(error.value)
    aside = saved.folder / f"{name}.aside-1"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == left
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        find_artefacts(saved, "sft", "reward_model")
    survived(f"artefact: {name}/{file} damaged", str(error.value).split("(", 1)[1])


def test_nothing_set_aside_is_overwritten(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / "file").write_text(str(i))
        assert set_aside(tmp_path / "file") == tmp_path / f"file.aside-{i}"
    assert (tmp_path / "file.aside-1").read_text() == "1"


@pytest.mark.parametrize("moment", ["while writing", "between the two renamings"])
def test_an_interrupted_replacement_leaves_the_old_artefact(
    saved, world, monkeypatch, moment
):
    tokenizer = load_tokenizer(str(world / "model"))
    if moment == "while writing":
        monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    else:
        rename = type(saved.folder).rename
        monkeypatch.setattr(
            type(saved.folder),
            "rename",
            lambda a, b: interrupt() if "unfinished" in a.name else rename(a, b),
        )
    with pytest.raises(KeyboardInterrupt):
        save_artefact(saved, "sft", small_lm(seed=3), tokenizer, {"new": 1})
    monkeypatch.undo()
    (folder,) = find_artefacts(saved, "sft")
    assert json.loads((saved.folder / "sft/metrics.json").read_text()) == METRICS
    save_artefact(saved, "sft", small_lm(seed=3), tokenizer, {"new": 1})
    assert json.loads((saved.folder / "sft/metrics.json").read_text()) == {"new": 1}
    assert {p.name for p in saved.folder.iterdir()} == {"sft", "reward_model"}


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_a_failure_while_writing_leaves_the_old_text(tmp_path):
    file = tmp_path / "text"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new \ud800")  # half a character
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_new_folder_starts_empty(tmp_path):
    (tmp_path / "a.unfinished").mkdir()
    (tmp_path / "a.unfinished" / "left over").touch()
    with replacing(tmp_path / "a") as folder:
        assert list(folder.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


class Numbered:
    """Stands for a model and for a tokenizer: files that hold nothing but a number."""

    def __init__(self, number, file):
        self.number, self.file = number, file

    def save_pretrained(self, folder):
        save_file({"w": torch.full((300_000,), self.number)}, folder / self.file)


def keep_saving(settings):
    """Save one artefact after the other, for ever."""
    for number in itertools.count(1):
        files = ("model.safetensors", "tokenizer.safetensors")
        model, tokenizer = (Numbered(number, file) for file in files)
        save_artefact(settings, "sft", model, tokenizer, {"number": number})


@needs_posix
@pytest.mark.slow
def test_killed_at_any_moment_an_artefact_is_whole(settings, survived):
    """`kill -9` while one artefact replaces the other, again and again."""
    rng, fork = random.Random(0), multiprocessing.get_context("fork")
    kills, during, seen = 60, 0, set()
    files = ("model.safetensors", "tokenizer.safetensors")
    save_artefact(
        settings, "sft", *(Numbered(0, file) for file in files), {"number": 0}
    )
    for _ in range(kills):
        process = fork.Process(target=keep_saving, args=(settings,))
        process.start()
        process.join(0.05 + 0.1 * rng.random())  # a moment, and then
        process.kill()
        process.join()
        during += settings.folder.joinpath("sft.unfinished").exists()
        (folder,) = find_artefacts(settings, "sft")
        number = json.loads(Path(folder, "metrics.json").read_text())["number"]
        for file in files:
            assert (load_file(Path(folder, file))["w"] == number).all()
        seen.add(number)
    assert during and len(seen) > 3
    survived(
        f"kill -9 while an artefact is saved, {kills} times",
        f"each time it is whole, the old or the new; {during} died while writing",
    )
