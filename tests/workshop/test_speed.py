"""The loops do the same work, are timed by phase, and are added up right."""

import dataclasses
import json
import re
import warnings
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from practice import cells
from utils.models import PolicyWithValueHead
from utils.rollout import evaluate_responses, response_logprobs, sample_responses
from utils.runs import ROOT
from utils.settings import FULL, load_settings
from workshop import loops, speed, work

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
    batch = work.pad(prompts, given.stop_id, side="left")
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
    assert speed.with_table(PAGE, f"docs/{name}.json", found) == PAGE
    assert re.search(rf"<!-- docs/{name}.json -->\n\w", PAGE)


def test_the_share_of_the_ceiling_by_hand():
    """12 weights a layer and width squared, (2 + 7) / 2 + 15 tokens, 4 + 3 * 4 passes.

    The median of the ceilings is 171.6 GFLOP/s, that of our loop 82.0 seconds.
    """
    trunk, projection = 2 * 12 * 4 * 256**2 * 19.5 * 16, 2 * 50_257 * 256 * 15 * 15
    assert round(1000 * (trunk + projection) / 171.6e9 / 82.0, 2) == 0.55
    assert "| 82.0 (79.5 to 87.6) | 1.00 | 1.19 | 55% |" in PAGE


SPENT = []  # seconds, by the parts of a pretended notebook 3
spend = SPENT.append
PRETENDED = {
    "parameters": "raise NotImplementedError",
    "parts": """
import json, pathlib, torch, types, warnings
from tests.workshop.test_speed import spend
from utils.runs import code_hash

device, history, steps = torch.device("cuda"), [], 4
off = {"ratio": torch.tensor(0.25)}
scaler = types.SimpleNamespace(state_dict=lambda: {"scale": 512.0})
run = types.SimpleNamespace(optimizer=types.SimpleNamespace(scaler=scaler))
folder = pathlib.Path(CHANGES["runs_dir"], PRESET)
begun = (folder / "ppo.pt").exists()
def wait(seconds, times):
    spend(seconds)
    for _ in range(times):
        warnings.warn("called a synchronizing CUDA operation")
def sample_responses(): wait(3, 5)
def score(*_): wait(2, 0)
def collect_rollout(score): wait(1, 0); sample_responses(); score()
def ppo_update(): wait(4, 2); history.append({"optimizer_steps": 3.0})
def pause(step): wait(100, 9); sample_responses()
code = code_hash(collect_rollout, score)""",
    "loop": """
pause(0)
for step in range(2):
    collect_rollout(score); ppo_update(); pause(step + 1)""",
    "after": """
collect_rollout(score)
same = code_hash(collect_rollout, score) == code  # PPO asks when it begins
metrics = {"before": {"begun": begun}, "after": {"same": same}, "history": history}
(folder / "metrics.json").write_text(json.dumps(metrics))""",
}


def test_a_notebook_as_it_is_under_a_watch(tmp_path, monkeypatch):
    """Its seconds by hand; what `pause` takes, and what comes after, count nowhere."""
    made = [new_code_cell(y, id=x) for x, y in PRETENDED.items()]
    nbformat.write(new_notebook(cells=made), tmp_path / "3.ipynb")
    for module in (speed, cells):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "NOTEBOOKS", {"3": "3.ipynb"})
    monkeypatch.setattr(speed, "peak_memory", lambda device: 7.0)
    monkeypatch.setattr(work.Watch, "now", lambda watch: sum(SPENT))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    folder = tmp_path / "made/7/full"
    folder.mkdir(parents=True)
    (folder / "ppo.pt").touch()
    with warnings.catch_warnings():
        found = speed.stage(load_settings("full"), 7, "3", tmp_path / "made")
    assert found.pop("seconds") > 0
    assert found == {
        "peak_gib": 7.0,
        "before": {"begun": False},
        "after": {"same": True},
        "phases": {"generate": 6, "score": 4, "log-probs": 2, "update": 8},
        "waits": {"generate": 5, "score": 0, "log-probs": 0, "update": 2},
        "first_ratio_off": 0.25,
        "loss_scale": 512.0,
        "steps_left_out": 2 * 4 - 2 * 3,
    }


FOUND = {
    "loop": {**dict.fromkeys((*speed.PHASES, "memory"), [1.0]), "episodes": [128]},
    "ceiling": {"rate": [1e9]},
    "sft": {"seconds": [90.0], "peak_gib": [2.0]},
    "reward_model": {"seconds": [60.0], "peak_gib": [6.0]},
    "policy": {"seconds": [30.0], "peak_gib": [4.0]},
}
FOUND["policy"] |= {"after": {"reward": [0.75]}, "phases": {"generate": [1.0]}}
FOUND["policy"]["phases"] |= {"score": [2.0], "log-probs": [3.0], "update": [4.0]}


def test_what_a_gpu_took_is_said(settings, monkeypatch, capsys):
    """90 + 60 + 30 seconds; 1 of 1 + 2 + 3 + 4 seconds is sampling."""
    asked = []

    class Runs(SimpleNamespace):
        def __call__(self, part, ways, seeds=None):
            n = self.settings.max_new_tokens
            asked.extend((way[1:], n) for way in ways.values())
            return {x: FOUND.get(x, FOUND["loop"]) for x in ways}

    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    machine = {"gpu": "Tesla T4", "torch": "2.11", "transformers": "5.15"}
    head = {"machine": machine, "seeds": 1, "commit": "abc"}
    runs = Runs(settings=settings, processes=2, folder="made", head=head)
    runs.settings = dataclasses.replace(settings, precision="float16")
    with pytest.raises(SystemExit, match="would slow each other"):
        speed.gpu(runs)
    runs.processes = 1
    assert speed.gpu(runs)["stages"]["sft"] == FOUND["sft"]
    loops = [("ours",), ("naive",), (), ("ours", "float16")]
    stages = [((number, "made"), 5) for number in "123"]
    assert asked == [*((way, 15) for way in loops), *stages]
    line = f"Tesla T4, {settings.model_name} in float16: minutes 3.00, GiB at most "
    line += "6.00, sampling's share of PPO 0.10, reward 0.75"
    assert capsys.readouterr().out.count(line) == 2
