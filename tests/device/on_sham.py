"""What the project does on `sham`; test_device.py runs this in a process of its own."""

import contextlib
import dataclasses
import json

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch.nn.utils import parameters_to_vector

from practice.cells import LOOP, import_cells
from tests.device import sham
from tests.small import EOS, PROMPTS, SETTINGS, go, score, small_lm, small_tokenizer
from utils import runs
from utils.models import RewardModel, freeze, load_causal_lm
from utils.rollout import sample_responses

SHAM = torch.device("sham:0")
GENERATOR = torch.Generator(SHAM)


@pytest.fixture(scope="module")
def loop():
    return import_cells("3-RLHF.ipynb", *LOOP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk."""
    small_lm().float().save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return str(folder)


@pytest.fixture
def settings(folder, tmp_path):
    settings = {"model_name": folder, "runs_dir": str(tmp_path), "precision": "float16"}
    (tmp_path / "tiny").mkdir()
    return dataclasses.replace(SETTINGS, **settings)


def start(loop, settings):
    """A run of PPO on the device, and what `go` takes besides."""
    run = loop["fresh_run"](load_causal_lm(settings.model_name, SHAM), settings)
    reference = freeze(load_causal_lm(settings.model_name, SHAM))
    return run, (reference, score, lambda step: PROMPTS * 8, EOS)


def collected(loop, run, models, settings):
    reference, score, prompts_of, eos_id = models
    some = (run.policy, reference, score, prompts_of(0), eos_id, settings)
    rollout = loop["collect_rollout"](*some, run.generator)
    return loop["ppo_advantages"](rollout, settings, 0.1)


def update(loop, run, rollout, settings):
    how = (run.policy, run.optimizer, rollout, settings, run.generator)
    return loop["ppo_update"](*how)


WRONG = {
    "two devices": lambda x: x + torch.ones(2),
    "an index that lies elsewhere": lambda x: x.gather(0, torch.tensor([0])),
    "the CPU's generator": lambda x: x.uniform_(generator=torch.Generator()),
    "its generator on the CPU": lambda x: torch.rand(2, generator=GENERATOR),
    "its memory read by numpy": lambda x: x.numpy(),
    "float64, where there is none": lambda x: x.double(),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_it_has_the_manners_of_a_gpu(mistake):
    x = torch.empty(2, device=SHAM)
    assert x.isnan().all()
    sham.device.set_float64("float64" not in mistake)
    try:
        with pytest.raises((RuntimeError, TypeError), match="devi|float64"):
            WRONG[mistake](x)
    finally:
        sham.device.set_float64(True)


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
    run, models = start(loop, settings)
    rollout = collected(loop, run, models, settings)
    sham.waits.clear()
    stats = update(loop, run, rollout, settings)
    found = waits_per_step(len(stats["approx_kl"]))
    assert sum(found.values()) == 2, found


def test_sampling_waits_once_a_token(folder):
    lm, ids = load_causal_lm(folder, SHAM), torch.full((64, 3), 5, device=SHAM)
    sham.waits.clear()
    *_, mask = sample_responses(lm, ids, torch.ones_like(ids), EOS, 12)
    found = waits_per_step(mask.shape[1])
    assert sum(found.values()) == 1, found


def state_of(run):
    """All that a run has, as text: to be compared bit for bit."""
    state = {}
    for name, part in vars(run).items():
        how = next((x for x in ("get_state", "state_dict") if hasattr(part, x)), None)
        state[name] = getattr(part, how)() if how else part
    return {k: json.dumps(x, default=torch.Tensor.tolist) for k, x in state.items()}


def test_a_run_in_float16_goes_on_bit_for_bit(loop, settings, tmp_path):
    """With moments, loss scale and generator, after a stop between two saves."""
    ends, begun = [], []
    for place, last in (("whole", None), ("cut", 1), ("cut", None)):
        runs_dir = tmp_path / place
        (runs_dir / "tiny").mkdir(parents=True, exist_ok=True)
        settings = dataclasses.replace(settings, runs_dir=str(runs_dir))
        run, models = start(loop, settings)
        checkpoint = runs.Checkpoint(run, settings, (loop["train"],), (), every=1)
        checkpoint.restore()
        begun.append(len(run.history))

        def pause(step, checkpoint=checkpoint, last=last):
            checkpoint.save()
            if step == last:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            go(loop, run, models, settings, pause)
        ends.append(state_of(run))
    assert begun == [0, 0, 1]
    whole, _, resumed = ends
    assert [name for name in whole if whole[name] != resumed[name]] == ["seconds"]
    moments = run.optimizer.optimizer.state.values()
    assert {x.device for state in moments for x in state.values()} == {SHAM}


BIG = """
import torch
def hold():
    big = torch.ones(400_000, device="sham")
    return big * 2
hold()
"""


def test_a_full_device_is_said_in_a_sentence_and_holds_nothing(monkeypatch, capsys):
    shell = InteractiveShell.instance()
    monkeypatch.setattr(runs, "get_ipython", lambda: shell)
    runs.say_errors_in_a_sentence("policy")
    held = sham.device.memory_allocated()
    sham.device.set_limit(held + 2_000_000)
    shell.run_cell(BIG)
    sham.device.set_limit(0)
    said = capsys.readouterr().out.strip()
    assert said.startswith("OutOfMemoryError: sham out of memory. Tried"), said
    assert "; lower ppo_micro_batch_size" in said and "\n" not in said
    assert sham.device.memory_allocated() == held


def test_loss_scaling_shortens_no_step(loop, settings):
    """In float16 an update moves the weights as far as in float32."""
    moved = []
    for precision in ("float32", "float16"):
        some = dataclasses.replace(settings, precision=precision)
        run, models = start(loop, some)
        assert run.optimizer.scaler.is_enabled() == (precision == "float16")
        rollout = collected(loop, run, models, some)
        before = parameters_to_vector(run.policy.parameters())
        update(loop, run, rollout, some)
        after = parameters_to_vector(run.policy.parameters())
        moved.append((after - before).norm().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.1), moved


def test_an_update_ends_early(loop, settings):
    settings = dataclasses.replace(settings, max_approx_kl=1e-12)
    run, models = start(loop, settings)
    rollout = collected(loop, run, models, settings)
    for _ in range(2):  # the scaler allows another update after it
        stats = update(loop, run, rollout, settings)
        assert stats["optimizer_steps"] == len(stats["approx_kl"]) - 1 < 8


def test_the_vocabulary_head_stays_tied(folder):
    """Some devices, this one among them, untie it when a model moves there."""
    lm = load_causal_lm(folder, SHAM)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
