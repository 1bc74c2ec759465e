"""The loops do the same work, are timed by phase, and are added up right."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from utils.data import pad
from utils.models import PolicyWithValueHead
from utils.rollout import evaluate_responses, response_logprobs, sample_responses
from utils.settings import FULL, ROOT
from workshop import loops, measure, speed, work

PAGE = (ROOT / "docs/speed.md").read_text("utf8")


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    """Those of a model of a few weights, and small rollouts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "world").symlink_to(world)
    work.build_model(folder / "speed", n_layer=1, n_head=2, n_embd=8, n_positions=32)
    own = {"ppo_rollout_size": 8, "ppo_episodes": 16, "ppo_minibatch_size": 4}
    own |= {"max_new_tokens": 5, "max_approx_kl": 0, "ppo_micro_batch_size": 4}
    own |= {"model_name": f"{folder}/speed", "dataset_name": f"{world}/dataset"}
    return dataclasses.replace(FULL, **own, precision="float32")


@pytest.mark.parametrize("name", ["ours", "naive", "trl"])
def test_every_loop_is_timed_by_phase_and_takes_the_same_steps(settings, name):
    if name == "trl":
        pytest.importorskip("trl.experimental.ppo")
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        found = speed.timed(settings, 0, name)
    finally:
        hook.remove()
    assert set(found) == {*speed.PHASES, "memory", "episodes"}
    assert min(found.values()) > 0 and found["episodes"] == 16
    assert len(steps) == 2 * FULL.ppo_epochs * 2  # rollouts, epochs, minibatches


def test_the_naive_parts_give_what_ours_give(settings):
    """No response ends before its last slot; prompts of one, two and seven tokens."""
    given = work.Work(settings, 0)
    policy = PolicyWithValueHead(given.reference)
    torch.nn.init.normal_(policy.value_head.weight)
    prompts = [given.prompts[i][:n] for i, n in enumerate((1, 2, 7))]
    slow = loops.slow_parts(given)
    batch = pad(prompts, given.stop_id, side="left")
    how = given.stop_id, 5, 1.0, torch.Generator().manual_seed(0)
    for sample in (slow["sample_responses"], sample_responses):
        texts = sample(given.reference, *batch, *how)
        assert texts[0].shape == texts[1].shape and texts[2].shape == (3, 5)
        assert texts[2].all() and texts[1][:, -5:].all()
    for function, arguments in (
        (given.score, texts),
        (response_logprobs, (given.reference, *texts, 0.7)),
        (evaluate_responses, (policy, *texts, 1.0)),
    ):
        with torch.no_grad():
            theirs, mine = slow[function.__name__](*arguments), function(*arguments)
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["speed", "speed-real"])
def test_the_page_quotes_what_was_measured(name):
    found = json.loads((ROOT / f"docs/{name}.json").read_text("utf8"))
    assert speed.table(found) in PAGE


def test_the_operations_of_an_episode_by_hand():
    """12 weights a layer and width squared, 4.5 + 15 tokens, 4 + 3 * 4 passes."""
    model = {"layers": 4, "width": 256, "words": 50_257}
    settings = {"prompt_max_tokens": 7, "max_new_tokens": 15, "ppo_epochs": 4}
    trunk, projection = 2 * 12 * 4 * 256**2 * 19.5 * 16, 2 * 50_257 * 256 * 15 * 15
    assert speed.operations(model, settings) == trunk + projection


@pytest.mark.slow
def test_a_gpu_is_measured(settings, world, tmp_path, monkeypatch, capsys):
    """For real, on a CPU and with few texts: loops, and notebooks 1 to 3 as they are.

    A run that stopped would look quick: what it has left is not taken up.
    """
    threads = lambda n, *_, **__: ThreadPoolExecutor(n)  # noqa: E731
    monkeypatch.setattr(measure, "ProcessPoolExecutor", threads)
    few = {"train_rows": 320, "train_anyway": True, "model_name": f"{world}/model"}
    few |= {"eval_prompts": 16, "normalise_samples": 32, "possible_samples": 2}
    runs = measure.Runs(dataclasses.replace(settings, **few), 1, 1, tmp_path)
    runs.head = measure.origin() | {"seeds": 1}
    (folder := tmp_path / "42/full").mkdir(parents=True)
    (folder / "ppo.pt").write_text("half a run")
    found = speed.gpu(runs)
    policy, said = found["stages"]["policy"], capsys.readouterr().out
    phases = {phase: x for phase, (x,) in policy["phases"].items()}
    metrics = json.loads((folder / "policy/metrics.json").read_text())
    assert sum(phases.values()) == pytest.approx(metrics["seconds"], rel=0.2)
    assert list(phases) == list(speed.PHASES) and min(phases.values()) > 0
    assert policy["first_ratio_off"][0] < 1e-5 and policy["steps_left_out"] == [0]
    share = phases["generate"] / sum(phases.values())
    line = f" in float32: .* PPO {share:.2f}, reward {policy['after']['reward'][0]:.2f}"
    assert len(re.findall(line, said)) == 2
    assert "Rollouts of 64 responses of 15 tokens each" in said
