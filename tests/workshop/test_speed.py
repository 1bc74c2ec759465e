"""The loops do the same work, are timed by phase, and are added up right."""

import dataclasses
import json
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from utils.models import PolicyWithValueHead
from utils.rollout import evaluate_responses, response_logprobs, sample_responses
from utils.runs import ROOT
from utils.settings import FULL
from workshop import loops, speed, work

PAGE = (ROOT / "docs/speed.md").read_text("utf8")


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    """Those of a model of a few weights, and small rollouts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "world").symlink_to(world)
    work.build_model(folder / "speed", n_layer=1, n_head=2, n_embd=8, n_positions=32)
    sizes = {"ppo_rollout_size": 8, "ppo_episodes": 16, "ppo_minibatch_size": 4}
    sizes |= {"max_new_tokens": 5, "max_approx_kl": 0, "ppo_epochs": 4}
    sizes |= {"ppo_micro_batch_size": 4, "precision": "float32"}
    names = {"model_name": folder / "speed", "dataset_name": world / "dataset"}
    names = {name: str(place) for name, place in names.items()}
    return dataclasses.replace(FULL, **sizes, **names)


@pytest.fixture(scope="module")
def given(settings):
    return work.Work(settings, 0)


@pytest.mark.parametrize("name", ["ours", "naive", "trl"])
def test_every_loop_is_timed_by_phase_and_takes_the_same_steps(settings, name):
    if name == "trl":
        reason = "pip install -r workshop/speed-requirements.txt"
        pytest.importorskip("trl.experimental.ppo", reason=reason)
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        found = speed.timed(settings, 0, name)
    finally:
        hook.remove()
    assert set(found) == {*speed.PHASES, "memory", "episodes"}
    assert min(found.values()) > 0 and found["episodes"] == 16
    assert len(steps) == 2 * 4 * 2  # rollouts, epochs, minibatches


def test_the_naive_parts_give_what_ours_give(given):
    """No response ends before its last slot; prompts of one, two and seven tokens."""
    policy = PolicyWithValueHead(given.reference)
    torch.nn.init.normal_(policy.value_head.weight)
    prompts = [given.prompts[i][:n] for i, n in enumerate((1, 2, 7))]
    slow = loops.slow_parts(given)
    batch = work.pad(prompts, given.stop_id, side="left")
    how = given.stop_id, 5, 1.0, torch.Generator().manual_seed(0)
    for sample in (slow["sample_responses"], sample_responses):
        texts = sample(given.reference, *batch, *how)
        assert texts[0].shape == texts[1].shape and texts[2].shape == (3, 5)
        assert texts[2].all() and texts[1][:, -5:].all()
    ours = {"score": given.score, "response_logprobs": response_logprobs}
    ours["evaluate_responses"] = evaluate_responses
    more = {"score": texts, "response_logprobs": (given.reference, *texts, 0.7)}
    more["evaluate_responses"] = policy, *texts, 1.0
    for name, function in ours.items():
        with torch.no_grad():
            theirs, mine = slow[name](*more[name]), function(*more[name])
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["speed", "speed-real"])
def test_the_page_quotes_what_was_measured(name):
    found = json.loads((ROOT / f"docs/{name}.json").read_text("utf8"))
    assert speed.with_table(PAGE, f"docs/{name}.json", found) == PAGE
    assert re.search(rf"<!-- docs/{name}.json -->\n\w", PAGE)


def test_the_share_of_the_ceiling_by_hand():
    """12 weights a layer and width squared, (2 + 7) / 2 + 15 tokens, 4 + 3 * 4 passes.

    The median of the ceilings is 171.6 GFLOP/s, that of our loop 82.0 seconds.
    """
    trunk, projection = 2 * 12 * 4 * 256**2 * 19.5 * 16, 2 * 50_257 * 256 * 15 * 15
    assert round(1000 * (trunk + projection) / 171.6e9 / 82.0, 2) == 0.55
    assert "| 82.0 (79.5 to 87.6) | 1.00 | 1.19 | 55% |" in PAGE
