"""The benchmarks run, time what they say, and add it up right."""

import dataclasses
import json
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import report
from benchmarks.compare import LOOPS, loop, supervised
from benchmarks.ours import first_ratio
from benchmarks.work import Enough, Watch, Work
from utils.data import load_tokenizer
from utils.rollout import evaluate_responses
from utils.settings import FULL
from utils.support.notebook import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SETTINGS = dataclasses.replace(
    FULL,
    ppo_episodes=32,
    ppo_rollout_size=8,
    ppo_epochs=4,
    ppo_minibatch_size=4,
    ppo_micro_batch_size=4,
    max_new_tokens=5,
    eval_prompts=8,
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
    return Work(folder, folder, str(world / "dataset"), SETTINGS, never_ends=True)


def loop_or_skip(name):
    if name == "peers":
        pytest.importorskip("trl", reason="pip install -r benchmarks/requirements.txt")
    return name


@pytest.mark.parametrize("name", LOOPS)
def test_every_ppo_loop_is_timed_by_phase_and_judged(work, name):
    found = loop(loop_or_skip(name), "ppo", work, rollouts=2, every=8)
    assert len(found["rollouts"]) == 2
    for rollout in found["rollouts"]:
        assert set(rollout) == set(report.PHASES)
        assert min(rollout.values()) > 0
    assert [place["episodes"] for place in found["judged"]] == [0, 8, 16]
    assert found["judged"][0]["kl"] == 0  # the policy is still the reference
    assert all(abs(place["kl"]) > 0 for place in found["judged"][1:])
    assert found["judged"][1]["seconds"] == pytest.approx(
        sum(found["rollouts"][0].values())
    )


@pytest.mark.parametrize("name", LOOPS)
def test_every_ppo_loop_takes_the_same_steps(work, name):
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        loop(loop_or_skip(name), "ppo", work, rollouts=2)
    finally:
        hook.remove()
    assert len(steps) == 2 * 4 * 2  # rollouts, epochs, minibatches


def test_a_loop_that_is_stopped_is_judged_then(work):
    found = loop("ours", "ppo", work, every=800, limit=0.0)
    assert [place["episodes"] for place in found["judged"]] == [0, 8]


def test_no_held_out_prompt_comes_from_a_training_sentence(work):
    reviews = work.reviews
    both = {**reviews, "validation": reviews["train"].select(range(50))}
    leaky = dataclasses.replace(work)
    leaky.__dict__["reviews"] = both
    with pytest.raises(ValueError, match="none of the 50 sentences"):
        _ = leaky.held_out


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_every_supervised_loop_is_timed(work, name, kind):
    found = supervised(loop_or_skip(name), kind, work, n_rows=64)
    assert found["seconds"] > 0
    rows = work.rows("train", 64, SETTINGS.sft_min_tokens if kind == "sft" else 2)
    assert len(rows) == 64
    assert found["tokens"] == sum(len(row) for row, _ in rows)


def test_no_response_ends_where_the_stop_token_is_never_written(work):
    for _, _, mask in work.sample(work.reference, work.prompts[:16]):
        assert mask.sum(1).tolist() == [5] * len(mask)


def test_the_error_of_the_first_ratio(work, monkeypatch):
    assert first_ratio(work) < 1e-5

    def a_hundredth_off(*arguments):
        logprobs, values = evaluate_responses(*arguments)
        return logprobs - 0.01, values

    monkeypatch.setattr("benchmarks.ours.evaluate_responses", a_hundredth_off)
    assert first_ratio(work) == pytest.approx(1 - math.exp(-0.01), rel=1e-3)


def test_a_watch_gives_each_second_to_one_phase(work, monkeypatch):
    time = iter(range(100))
    monkeypatch.setattr(Watch, "now", lambda self: next(time))
    watch = Watch(work, rollouts=1)  # 0: log-probs from here on
    inner = watch.timed("generate", lambda: None)
    outer = watch.timed("update", inner)
    outer()  # 1 to update, 2 to generate, 3 and 4 back
    with pytest.raises(Enough):
        watch.rollout_done(work.reference)  # 5
    expected = {"log-probs": 1 + 1, "update": 1 + 1, "generate": 1}
    assert watch.report()["rollouts"] == [expected]


def run(seconds, memory=1.0):
    """Two rollouts, of which the first was to warm up."""
    return {
        "rollouts": [
            {"update": 99.0},
            {"generate": seconds / 4, "update": seconds / 2},
        ],
        "memory": memory,
    }


def test_the_ppo_table_by_hand():
    found = {
        "ppo_settings": dataclasses.asdict(
            dataclasses.replace(SETTINGS, ppo_rollout_size=4, max_new_tokens=10)
        ),
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
    }
    text = report.ppo_table(found)
    # 6 s of which 1/4 and 1/2 are known, for 4 episodes: 375 s and 750 s for 1,000
    assert (
        "| notebook | 375.0 | 0.0 | 0.0 | 750.0 | 1,125 (750 to 1,500) | 1.00" in text
    )
    # against ours, round by round: 2, 3, 5 and 3, 2, 2
    assert "4,500 (1,500 to 5,625) | 3.00" in text
    assert "2,250 (2,250 to 3,000) | 2.00" in text
    # 12 weights a layer and width squared, (2 + 7) / 2 + 10 tokens, 4 + 3 * 4 passes
    trunk, projection = 2 * 12 * 100 * 14.5 * 16, 2 * 100 * 10 * 10 * 15
    share = 1000 * (trunk + projection) / 1e6 / 1125
    assert f"| {share:.0%} |" in text
    assert "75.0 % of the update's time; into memory that is ready, 50.0 %" in text


def judged(*rewards, seconds=10):
    places = [
        {"seconds": seconds * i, "episodes": 256 * i, "reward": reward, "kl": i / 10}
        for i, reward in enumerate(rewards)
    ]
    return {"judged": places}


def test_the_time_to_quality_by_hand():
    found = {
        "quality": {
            "ours": [judged(0.0, 0.55, 0.85)] * 3,
            "naive": [judged(0.0, 0.1, 0.2, 0.3, 0.4, seconds=20)] * 3,
            "peers": [judged(0.0, 0.4, 0.6, 0.7, 0.8, seconds=15)] * 3,
        },
        "first_ratio": {"float32": [2e-6], "bfloat16": [0.012]},
    }
    lines = report.quality_table(found).splitlines()
    assert "| 0.5, notebook | 10.0 (10.0 to 10.0) | 256 (256 to 256) | 0.1" in lines[4]
    assert "| 0.5, naive loop | not in 80.0 (80.0 to 80.0) | reached 0.40" in lines[5]
    assert lines[5].endswith("over 8.0 |")
    assert "| 0.5, TRL 1.12.0 | 30.0 (30.0 to 30.0) | 512" in lines[6]
    assert lines[6].endswith("| 3.0 |") and lines[9].endswith("| 3.0 |")
    found["quality"]["ours"] = [judged(0.0, 0.55, 0.7)] * 3
    worse = report.quality_table(found).splitlines()
    assert worse[7].startswith("| 0.8, notebook | not in 20.0")
    assert worse[9].startswith("| 0.8, TRL 1.12.0 | 60.0") and worse[9].endswith("|  |")
    assert lines[-1].endswith("one rollout: 2e-06 in float32 and 1e-02 in bfloat16.")


def test_growth_by_hand():
    def run(*seconds, memory):
        rollouts = [{"update": 50.0}, *({"update": s} for s in seconds)]
        peaks = [memory + i / 100 for i in range(len(rollouts))]
        return {"rollouts": rollouts, "memory": peaks[-1], "peaks": peaks}

    found = {
        "growth": {
            "64": [run(1.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, memory=2.0)],
            "128": [run(3.0, 2.4, memory=3.0)],
            "256": [run(4.5, memory=4.0)],
        }
    }
    lines = report.growth_table(found).splitlines()[4:]
    assert lines[0] == "| 64 in rollouts of 64 | 1.0 | 0.94 | 2.01 |"
    assert lines[2] == "| 256 in rollouts of 64 | 4.5 | 1.06 | 2.04 |"
    assert lines[3] == "| 512 in rollouts of 64 | 8.5 | 1.00 | 2.08 |"
    assert lines[4] == "| 256 in rollouts of 128 | 5.4 | 1.20 | 3.02 |"
    assert lines[5] == "| 256 in rollouts of 256 | 4.5 | 1.00 | 4.01 |"


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "real"])
def test_the_page_quotes_what_was_measured(folder):
    measured = json.loads((folder / "compare.json").read_text())
    text = (folder / "compare.md").read_text()
    assert report.text_of(measured) == text
    assert text.strip() in (ROOT / "docs/speed.md").read_text()


def test_parts_that_were_not_measured_are_left_out(tmp_path):
    found = {
        "machine": {
            "cpu": "x",
            "threads": 2,
            "gpu": None,
            "torch": "1",
            "transformers": "2",
        },
        "model": {"layers": 1, "width": 10, "words": 100},
        "supervised": {
            kind: {
                name: [{"tokens": 100, "seconds": s, "memory": 1.0}]
                for name, s in zip(LOOPS, (1.0, 2.0, 4.0), strict=True)
            }
            for kind in ("sft", "rm")
        },
    }
    text = report.write(json.loads(json.dumps(found)), tmp_path)
    assert "| SFT, naive loop | 50.0 | 2.00 |" in text
    assert "### PPO" not in text
    assert (tmp_path / "compare.md").read_text() == text
