"""What PPO takes in memory, at its peak: `python -m tools.peaks`.

Models of random numbers, of three sizes, in full fine-tuning and in layout 2 of
`more/8-Adapters.ipynb`, by the loop of notebook 3; each in a process of its own.
Counted is what PyTorch allocates, by its profiler; beside it stands the most that the
process held, Python and libraries included. They go to `docs/peaks.json`, and the tests
compare them with `layout_memory`. What stands there is not measured again.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from more import lora
from more.common import write_text
from more.memory import bytes_of, layout_memory
from practice.cells import LOOP, import_cells
from tools.real_run import run_measured
from utils.models import RewardModel, freeze
from utils.rollout import has_ended, normalise_scores
from utils.runs import ROOT
from utils.settings import FULL
from utils.training import seed_everything

RESULTS = "docs/peaks.json"
LAYOUTS, RANK = (0, 2), 16
GPT2 = {"n_head": 4, "activation_function": "gelu_pytorch_tanh"}
CONFIGS = {
    "0.4M": GPT2Config(n_layer=3, n_embd=96, n_positions=128, vocab_size=927, **GPT2),
    "16M": GPT2Config(n_layer=4, n_embd=256, n_positions=256, **GPT2),
    "135M": LlamaConfig(  # as SmolLM2
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}
SETTINGS = dataclasses.replace(
    FULL,
    precision="float32",
    max_new_tokens=24,
    ppo_episodes=16,
    ppo_rollout_size=16,
    ppo_epochs=2,
    ppo_minibatch_size=16,
    ppo_micro_batch_size=8,
)


def peak_of(function: Callable) -> int:
    """The most bytes that a call holds at once beside what was there, on the CPU.

    Whatever PyTorch allocates, temporary or not, by its profiler.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        function()
    events = [e for e in found.profiler.kineto_results.events() if e.nbytes()]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def build(config, layout: int) -> list:
    """Random language models for policy, reference and reward model, in this layout."""
    seed_everything(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    if layout == 0:
        return [lm, *(AutoModelForCausalLM.from_config(config) for _ in range(2))]
    for name in ("reward", "policy"):
        lora.add_adapter(lm, name, RANK)
    return [lora.sharing(lm, name) for name in ("policy", None, "reward")]


def measure(config, settings, layout: int) -> dict:
    """The parts of the peak over a rollout and its update, in bytes.

    Activations are what there is beside weights, gradients and optimiser.
    """
    policy, reference, judge = build(config, layout)
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *LOOP))
    reference, reward_model = freeze(reference), freeze(RewardModel(judge.base_model))
    names = {"lesson3": three}
    eight = import_cells("more/8-Adapters.ipynb", "fresh-adapter-run", names=names)
    run = eight["fresh_adapter_run"](policy, settings)
    eos_id, size = config.vocab_size - 1, settings.prompt_max_tokens
    prompts = torch.randint(0, eos_id, (settings.ppo_rollout_size, size)).tolist()

    def score(ids, attention, mask):
        raw = reward_model(ids, attention)
        return raw, normalise_scores(raw, has_ended(ids, mask, eos_id), 0, 1, -2)

    def train():
        how = (three.ppo_advantages, three.ppo_update)
        rest = (lambda step: prompts, eos_id, settings)
        three.train(run, reference, score, *rest, *how)

    models = (run.policy, reference, reward_model)
    weights = bytes_of(p for m in models for p in (*m.parameters(), *m.buffers()))
    peak = weights + peak_of(train)
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    states = run.optimizer.optimizer.state.values()
    found = {
        "weights": weights,
        "gradients": bytes_of(p.grad for p in trained),
        "optimiser": bytes_of(x for s in states for x in s.values() if x.dim()),
    }
    return {**found, "activations": peak - sum(found.values()), "total": peak}


def worked_out(config, settings, layout: int) -> dict:
    """The same by `layout_memory`, from the model's sizes alone."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    parts = layout_memory(shapes, settings, layout, RANK)
    return {**parts, "total": sum(parts.values())}


def main(argv=None):
    """Measure each in a process of its own, and write what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.peaks", description="The peaks of PPO's memory."
    )
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "LAYOUT"), help="here")
    options = parser.parse_args(argv)
    path = ROOT / RESULTS
    found = json.loads(path.read_text("utf8")) if path.exists() else {}
    if options.one:
        size, layout = options.one
        torch.set_num_threads(1)
        parts = measure(CONFIGS[size], SETTINGS, int(layout))
        found[f"{size}, layout {layout}"] = {"measured": parts}
        write_text(path, json.dumps(found, indent=1) + "\n")
        return
    for size, layout in ((size, layout) for size in CONFIGS for layout in LAYOUTS):
        name = f"{size}, layout {layout}"
        if "process" in found.get(name, {}):
            continue
        command = [sys.executable, "-m", "tools.peaks", "--one", size, str(layout)]
        failed, spent = run_measured(command, dict(os.environ))
        if failed:
            sys.exit(f"{name} failed, see above")
        found = json.loads(path.read_text("utf8"))
        found[name]["process"] = round(spent["peak_gib"] * 2**30)
        write_text(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
