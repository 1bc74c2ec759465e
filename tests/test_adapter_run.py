"""A run of PPO on one base with adapters, by the loop of notebook 3, unchanged."""

import contextlib
import copy
import dataclasses
import re

import nbformat
import pytest
import torch

from tests.conftest import run_series
from tests.test_checkpoint import SETTINGS as LONG
from tests.test_preflight import give_numbers, reads
from tests.test_rollout import EOS, PROMPTS, small_lm
from utils import lora
from utils.models import RewardModel, freeze
from utils.support.checkpoint import Checkpoint
from utils.support.notebook import LOOP, import_cells

LESSON = "more/7-Adapters.ipynb"


class OneBase:
    """What notebook 7 trains, for a very small model; stopped after some rollouts."""

    def __init__(self, settings):
        three = import_cells("3-RLHF.ipynb", *LOOP)
        names = {"lesson3": type("lesson3", (), three)}
        seven = import_cells(LESSON, "fresh-adapter-run", names=names)
        torch.manual_seed(0)
        self.lm = small_lm().float()
        lora.add_adapter(self.lm, "reward", rank=2)
        give_numbers(self.lm, "reward")
        trunk = lora.sharing(self.lm, "reward").base_model
        torch.manual_seed(0)  # for the head
        self.reward_model = freeze(RewardModel(trunk).float())
        lora.add_adapter(self.lm, "policy", rank=2)
        self.reference = freeze(lora.sharing(self.lm, None))
        self.policy = lora.sharing(self.lm, "policy")
        self.settings, self.three = settings, three
        self.run = seven["fresh_adapter_run"](self.policy, settings)
        how = (three["ppo_advantages"], three["ppo_update"])
        inputs = {"reference": self.reference, "reward model": self.reward_model}
        self.checkpoint = Checkpoint(self.run, settings, how, inputs)
        self.checkpoint.restore()
        self.how = how

    def go(self, until=None):
        class Stop(Exception):
            pass

        def pause(step):
            self.checkpoint.save()
            if step == until:
                raise Stop

        models = (self.reference, reads(self.reward_model))
        prompts = (lambda step: PROMPTS * 8, EOS)
        with contextlib.suppress(Stop):
            self.three["train"](
                self.run, *models, *prompts, self.settings, *self.how, pause
            )
        return self

    def trained(self):
        return {
            key: p.detach().clone()
            for key, p in self.run.policy.named_parameters()
            if p.requires_grad
        }


@pytest.fixture
def settings(tmp_path):
    return dataclasses.replace(LONG, ppo_episodes=96, runs_dir=str(tmp_path))


def test_nothing_of_the_base_moves_and_the_other_adapter_neither(settings):
    one = OneBase(settings)
    before = copy.deepcopy(one.lm.state_dict())
    start = one.trained()
    one.go()
    after = one.lm.state_dict()
    moved = [key for key, x in before.items() if not torch.equal(x, after[key])]
    assert moved and all(".adapters.policy." in key for key in moved)
    assert all(not torch.equal(x, one.trained()[key]) for key, x in start.items())
    assert len(one.run.history) == 4
    assert one.run.history[0]["kl"] == 0  # to the last bit: the fresh adapter is none
    assert one.run.history[-1]["kl"] != 0


def test_the_optimiser_holds_the_adapter_and_the_value_head(settings):
    one = OneBase(settings)
    groups = one.run.optimizer.optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    names = {k for k, p in one.run.policy.named_parameters() if id(p) in held}
    assert {n for n in names if ".adapters.policy." not in n} == {
        "value_head.weight",
        "value_head.bias",
    }
    assert len(names) == 2 + 2 * 8  # two matrices for each of eight layers


def test_an_interrupted_run_ends_where_it_would_have_from_a_small_file(
    settings, tmp_path
):
    runs = {name: str(tmp_path / name) for name in ("whole", "cut")}
    whole = OneBase(dataclasses.replace(settings, runs_dir=runs["whole"])).go()
    cut = dataclasses.replace(settings, runs_dir=runs["cut"])
    OneBase(cut).go(until=2)
    again = OneBase(cut)
    assert len(again.run.history) == 2
    again.go()
    for key, value in whole.trained().items():
        assert torch.equal(value, again.trained()[key]), key
    assert [row["score"] for row in again.run.history] == [
        row["score"] for row in whole.run.history
    ]
    # What is trained, and its two moments, in 4 bytes; not the base
    numbers = sum(x.numel() for x in whole.trained().values())
    size = whole.checkpoint.path.stat().st_size
    assert 12 * numbers < size < 12 * numbers + 40_000
    assert sum(p.numel() for p in whole.lm.parameters()) > 3 * numbers
    lora.save_adapter(whole.policy, "policy", tmp_path / "policy")
    fresh = lora.load_adapter(small_lm().float(), "policy", tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, whole.policy(ids).logits)


@pytest.mark.slow
def test_the_notebook_trains_in_every_layout(series, tmp_path):
    """With two rollouts each; the reward adapters are as good as they can be."""
    folder, _ = series
    runs = tmp_path / "runs" / "tiny"
    runs.mkdir(parents=True)
    for name in ("sft", "reward_model"):
        (runs / name).symlink_to(folder / name)
    few = ("--only", "7", "--set", "adapter_rollouts=2")
    done = run_series(*few, RLHF_RUNS_DIR=str(runs.parent))
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(runs / "7-Adapters.ipynb", as_version=4).cells
    said = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in cells
        if cell.cell_type == "code"
    }
    accuracy = re.findall(r": ([\d.]+)% of the held-out labels", said["reward-train"])
    assert len(accuracy) == 2 and min(map(float, accuracy)) > 85
    assert said["preflight"].count("✓") == 16 and "✗" not in said["preflight"]
    same, of = re.search(r"(\d+) of (\d+) tensors", said["unmoved"]).groups()
    assert same == of
    off = re.findall(r"off by (\S+)", said["readings-real"])
    assert len(off) == 4 and max(map(float, off)) < 1e-3
    kept = re.findall(r"without activations ([\d.]+)", said["memory-plot"])
    full, one, two, three = map(float, kept)
    assert two < min(one, three) and max(one, three) < full
