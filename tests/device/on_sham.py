"""What the project does on `sham`; test_device.py runs this in a process of its own."""

import dataclasses

import pytest
import torch

from practice.cells import import_cells
from tests.device import sham
from tests.small import EOS, PROMPTS, SETTINGS, score, small_lm, small_tokenizer
from tests.utils.test_checkpoint import Started
from utils.models import RewardModel, freeze, load_causal_lm
from utils.rollout import sample_responses

SHAM = torch.device("sham:0")
GENERATOR = torch.Generator(SHAM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk."""
    small_lm().float().save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return str(folder)


@pytest.fixture
def settings(folder, tmp_path):
    settings = {"model_name": folder, "runs_dir": str(tmp_path), "precision": "float16"}
    return dataclasses.replace(SETTINGS, **settings)


WRONG = {
    "two devices": lambda x: x + torch.ones(2),
    "an index that lies elsewhere": lambda x: x.gather(0, torch.tensor([0])),
    "the CPU's generator": lambda x: x.uniform_(generator=torch.Generator()),
    "its generator on the CPU": lambda x: torch.rand(2, generator=GENERATOR),
    "its memory read by numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_it_has_the_manners_of_a_gpu(mistake):
    x = torch.empty(2, device=SHAM)
    assert x.isnan().all()
    with pytest.raises((RuntimeError, TypeError), match="devi"):
        WRONG[mistake](x)


def waits_per_step(steps):
    """How often a step of ours waits, by line: transformers waits by itself."""
    each = {at: n // steps for (_, at), n in sham.waits.items()}
    return {at: n for at, n in each.items() if n and at != "transformers"}


TRAINING = {
    "1-SFT.ipynb": ("batch-loss", "train-prepare", "train"),
    "2-RM Training.ipynb": ("scores", "train"),
}


@pytest.mark.parametrize("notebook, cells", TRAINING.items())
def test_sft_and_the_reward_model_wait_once_a_step(settings, notebook, cells):
    rows = {"train": [[3, 4, 5, EOS], [6, EOS], [7, 8, EOS]] * 12}  # more than weights
    names = {"settings": dataclasses.replace(settings, batch_size=1), "device": SHAM}
    names |= {"tokenizer": small_tokenizer(), "kept": rows, "rows": rows}
    names |= {"loss_before": 0.0, "validate": lambda model: 0.0}
    names |= {"labels": {"train": torch.tensor([1.0, 0.0] * 18), "validation": []}}
    names |= {"before": {"rm_loss": 0.0}, "measure": lambda *_: {"rm_loss": 0.0}}
    names["untrained"] = RewardModel.from_pretrained(settings.model_name).to(SHAM)
    names["validation_logits"] = lambda model: None
    sham.waits.clear()
    found = import_cells(notebook, *cells, names=names)
    found = waits_per_step(len(found["batches"]))
    assert sum(found.values()) == 1 and min(found).startswith("utils/training.py:")


def test_an_update_waits_twice_a_step(loop, settings):
    run = loop["fresh_run"](load_causal_lm(settings.model_name, SHAM), settings)
    reference, how = freeze(load_causal_lm(settings.model_name, SHAM)), run.generator
    models = (run.policy, reference, score)
    rollout = loop["collect_rollout"](*models, PROMPTS * 8, EOS, settings, how)
    rollout = loop["ppo_advantages"](rollout, settings, 0.1)
    sham.waits.clear()
    stats = loop["ppo_update"](run.policy, run.optimizer, rollout, settings, how)
    found = waits_per_step(len(stats["approx_kl"]))
    assert sum(found.values()) == 2, found


def test_sampling_waits_once_a_token(folder):
    lm, ids = load_causal_lm(folder, SHAM), torch.full((64, 3), 5, device=SHAM)
    sham.waits.clear()
    *_, mask = sample_responses(lm, ids, torch.ones_like(ids), EOS, 12)
    found = waits_per_step(mask.shape[1])
    assert sum(found.values()) == 1, found


def test_a_run_in_float16_goes_on_bit_for_bit(settings, tmp_path):
    """With moments, loss scale and generator, after a stop between two saves."""
    settings, other = (
        dataclasses.replace(settings, ppo_episodes=144),
        tmp_path / "other",
    )
    whole = dataclasses.replace(settings, runs_dir=str(other))
    whole = Started(whole, device=SHAM).go()
    Started(settings, device=SHAM).go(until=3)
    again = Started(settings, device=SHAM)
    assert len(again.history) == 2 and again.ends_as(whole)
    moments = again.run.optimizer.optimizer.state.values()
    assert {x.device for state in moments for x in state.values()} == {SHAM}


def test_the_vocabulary_head_stays_tied(folder):
    """Some devices, this one among them, untie it when a model moves there."""
    lm = load_causal_lm(folder, SHAM)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
