"""The benchmarks run, time what they say, and add it up right."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import compare, report
from benchmarks.ceiling import ceiling
from benchmarks.compare import LOOPS, ppo, supervised
from benchmarks.work import Enough, Watch, Work
from utils.data import load_tokenizer
from utils.rollout import sample_responses
from utils.runs import ROOT
from utils.settings import FULL

RESULTS, KINDS = ROOT / "benchmarks" / "results", ("sft", "rm")
SETTINGS = dataclasses.replace(
    FULL,
    ppo_episodes=32,
    ppo_rollout_size=8,
    ppo_epochs=4,
    ppo_minibatch_size=4,
    ppo_micro_batch_size=4,
    max_new_tokens=5,
    max_approx_kl=0.0,
)


@pytest.fixture(scope="module")
def work(world, tmp_path_factory):
    """A model of a few weights, with the tiny world's tokenizer and reviews."""
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = load_tokenizer(world / "model")
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, bos_token_id=eos, eos_token_id=eos)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Work(folder, str(world / "dataset"), SETTINGS)


@pytest.fixture(params=LOOPS)
def name(request):
    if request.param == "peers":
        reason = "pip install -r benchmarks/requirements.txt"
        pytest.importorskip("trl.experimental.ppo", reason=reason)
    return request.param


def test_every_ppo_loop_is_timed_by_phase_and_takes_the_same_steps(work, name):
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        found = ppo(name, work, rollouts=2)
    finally:
        hook.remove()
    assert len(found["rollouts"]) == 2 and found["memory"] > 0
    for rollout in found["rollouts"]:
        assert set(rollout) == set(report.PHASES) and min(rollout.values()) > 0
    assert len(steps) == 2 * 4 * 2  # rollouts, epochs, minibatches


@pytest.mark.parametrize("kind", KINDS)
def test_every_supervised_loop_is_timed(work, name, kind):
    found = supervised(name, kind, work, n_rows=64)
    assert found["seconds"] > 0
    rows = work.rows(64, SETTINGS.sft_min_tokens if kind == "sft" else 2)
    assert len(rows) == 64
    assert found["tokens"] == sum(len(row) for row, _ in rows)


def test_the_products_of_an_update_are_found(work):
    found = ceiling(work)
    assert all(x > 0 for x in found.values())
    assert found["products_seconds"] < 100 * found["update_seconds"]


def test_no_response_ends_before_the_last_slot(work):
    prompts = torch.tensor([row[:2] for row in work.prompts[:16]])
    options = (work.stop_id, 5, 1.0, torch.Generator().manual_seed(0))
    texts = (prompts, torch.ones_like(prompts))
    _, _, mask = sample_responses(work.reference, *texts, *options)
    assert mask.shape == (16, 5) and mask.all()


def test_a_watch_gives_each_second_to_one_phase(monkeypatch):
    time = iter(range(100))
    monkeypatch.setattr(Watch, "now", lambda self: next(time))
    watch = Watch(torch.device("cpu"), rollouts=1)  # 0: log-probs from here on
    inner = watch.timed("generate", lambda: None)
    outer = watch.timed("update", inner)
    outer()  # 1 to update, 2 to generate, 3 and 4 back
    with pytest.raises(Enough):
        watch.rollout_done()  # 5
    assert watch.done == [{"log-probs": 1 + 1, "update": 1 + 1, "generate": 1}]


def run(seconds, memory=1.0):
    """Two rollouts, of which the first was to warm up."""
    timed = {"generate": seconds / 4, "update": seconds / 2}
    return {"rollouts": [{"update": 99.0}, timed], "memory": memory}


MADE_UP = {
    "ppo_settings": dataclasses.asdict(
        dataclasses.replace(SETTINGS, ppo_rollout_size=4, max_new_tokens=10)
    ),
    "machine": {"cpu": "x", "threads": 2, "gpu": None, "torch": "1"},
    "model": {"layers": 1, "width": 10, "words": 100},
    "ceiling": [
        {
            "rate": 1e6,
            "products_seconds": 3.0,
            "products_seconds_ready": 2.0,
            "update_seconds": 4.0,
        }
    ],
    "ppo": {
        "ours": [run(4), run(8), run(6)],
        "naive": [run(8), run(24), run(30)],
        "peers": [run(12), run(16), run(12)],
    },
    "supervised": {
        kind: {
            name: [{"tokens": 100, "seconds": s, "memory": 1.0}]
            for name, s in zip(LOOPS, (1.0, 2.0, 4.0), strict=True)
        }
        for kind in KINDS
    },
}
MADE_UP["machine"]["transformers"] = "2"


def test_the_tables_by_hand(tmp_path):
    text = report.write(MADE_UP, tmp_path)
    # 6 s of which 1/4 and 1/2 are known, for 4 episodes: 375 s and 750 s for 1,000
    row = "| notebook | 375.0 | 0.0 | 0.0 | 750.0 | 1,125 (750 to 1,500) | 1.00"
    assert row in text
    # against ours, round by round: 2, 3, 5 and 3, 2, 2
    assert "4,500 (1,500 to 5,625) | 3.00" in text
    assert "2,250 (2,250 to 3,000) | 2.00" in text
    # 12 weights a layer and width squared, (2 + 7) / 2 + 10 tokens, 4 + 3 * 4 passes
    trunk, projection = 2 * 12 * 100 * 14.5 * 16, 2 * 100 * 10 * 10 * 15
    share = 1000 * (trunk + projection) / 1e6 / 1125
    assert f"| {share:.0%} |" in text
    assert "75.0 % of the update's time; into memory that is ready, 50.0 %" in text
    assert "| SFT, naive loop | 50.0 | 2.00 |" in text
    assert (tmp_path / "compare.md").read_text() == text
    assert (tmp_path / "compare.png").stat().st_size > 1000


class Here:
    """In the place of a process for each measurement."""

    def __init__(self, *_, **__):
        """There is nothing to start."""

    def __enter__(self):
        def submit(function, *arguments):
            return SimpleNamespace(result=lambda: function(*arguments))

        return SimpleNamespace(submit=submit)

    def __exit__(self, *_):
        """Nor to end."""


def test_what_is_measured_again_replaces_what_was_and_the_rest_stays(
    work, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(compare, "bfloat16_is_fast", lambda: False)
    monkeypatch.setattr(compare, "ceiling", lambda work: MADE_UP["ceiling"][0])
    monkeypatch.setattr(compare, "ppo", lambda name, work: run(len(name)))
    one = MADE_UP["supervised"]["sft"]["ours"][0]
    monkeypatch.setattr(compare, "supervised", lambda *_: one)
    models = ["--model", work.model, "--dataset", work.dataset]
    options = [*models, "--output", str(tmp_path), "--rounds", "2"]
    compare.main(options)
    compare.main([*options, "--parts", "ppo", "--episodes", "128"])
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["ppo"] == {name: [run(len(name))] * 2 for name in LOOPS}
    assert found["supervised"] == {k: dict.fromkeys(LOOPS, [one] * 2) for k in KINDS}
    assert found["ppo_settings"]["ppo_rollout_size"] == 128
    assert (found["model"]["layers"], found["model"]["width"]) == (1, 8)
    text = (tmp_path / "compare.md").read_text()
    assert text == report.text_of(found) and "Rollouts of 128 responses of 15" in text


def test_parts_that_were_not_measured_are_left_out(tmp_path):
    found = {part: x for part, x in MADE_UP.items() if part != "ppo"}
    assert "### PPO" not in report.write(found, tmp_path)
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "real"])
def test_the_page_quotes_what_was_measured(folder):
    measured = json.loads((folder / "compare.json").read_text())
    text = (folder / "compare.md").read_text()
    assert report.text_of(measured) == text
    assert text.strip() in (ROOT / "docs/speed.md").read_text()
