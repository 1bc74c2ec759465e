"""What PPO keeps in memory: worked out by hand, counted, and against real sizes."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from more import lora
from more.memory import bytes_of, counted_memory, layout_memory
from practice.cells import LOOP, import_cells
from tests.small import SETTINGS, collect, guarded
from tests.test_lora import SHARED, free, gpt2, llama
from utils.models import PolicyWithValueHead, freeze
from utils.runs import ROOT
from utils.settings import FULL

RANK, GPT2 = 16, {"n_head": 4, "activation_function": "gelu_pytorch_tanh"}
MEASURED = {  # of docs/peaks.json, whose models were these, with these settings
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
MEASURED_WITH = dataclasses.replace(
    FULL,
    precision="float32",
    max_new_tokens=24,
    ppo_episodes=16,
    ppo_rollout_size=16,
    ppo_epochs=2,
    ppo_minibatch_size=16,
    ppo_micro_batch_size=8,
)


def build(config, layout):
    """Random language models for policy, reference and reward model, in this layout."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    if layout == 0:
        return [lm, *(AutoModelForCausalLM.from_config(config) for _ in range(2))]
    for name in ("reward", "policy"):
        lora.add_adapter(lm, name, RANK)
    return [lora.sharing(lm, name) for name in ("policy", None, "reward")]


def on_meta(**sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(GPT2Config(**sizes))


def test_the_weights_by_hand():
    """GPT-2 of one layer and width 8: counted from its shapes."""
    lm = on_meta(n_layer=1, n_head=2, n_embd=8, n_positions=4, **SHARED)
    embeddings, norms, head = 23 * 8 + 4 * 8, 3 * 16, 9
    linear = 8 * 24 + 8 * 8 + 8 * 32 + 32 * 8
    whole = embeddings + norms + linear + 24 + 8 + 32 + 8
    adapter = 2 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)
    found = [layout_memory(lm, SETTINGS, n, rank=2) for n in range(4)]
    weights = [3 * whole, 2 * whole + 2 * adapter, whole + 2 * adapter]
    weights += [2 * whole + adapter]
    assert [f["weights"] for f in found] == [4 * (w + 2 * head) for w in weights]
    assert found[0]["gradients"] == 4 * (whole + head)
    assert [f["gradients"] for f in found[1:]] == [4 * (adapter + head)] * 3
    assert all(f["optimiser"] == 2 * f["gradients"] for f in found)
    in_nf4 = layout_memory(lm, SETTINGS, 2, rank=2, precision="NF4")["weights"]
    rest = 2 * (whole - linear) + 4 * (2 * adapter + 2 * head)
    assert in_nf4 == pytest.approx(linear * 4.126953125 / 8 + rest)
    for layout, precision in ((4, "float32"), (2, "int8")):
        with pytest.raises(ValueError, match=f"no layout {layout} in '{precision}'; t"):
            layout_memory(lm, SETTINGS, layout, precision=precision)
    xl = {"n_layer": 48, "n_embd": 1600, "n_head": 25}
    for sizes, millions in (({}, 124.44), (xl, 1557.61)):  # of models that are known
        full, one = (layout_memory(on_meta(**sizes), FULL, n) for n in (0, 2))
        assert full["gradients"] / 4e6 == pytest.approx(millions, rel=1e-4)
        assert one["weights"] < 0.36 * full["weights"]


@pytest.mark.parametrize("layout", [0, 2])
@pytest.mark.parametrize("lm", [gpt2(128, 3), llama(128, 3, 2), llama(128, 3)])
def test_what_is_counted_is_what_was_worked_out(lm, layout):
    """Full fine-tuning and one base with two adapters; activations within 15 %."""
    few = {"ppo_micro_batch_size": 24, "ppo_minibatch_size": 24, "prompt_max_tokens": 4}
    settings = dataclasses.replace(SETTINGS, **few)
    loop = import_cells("3-RLHF.ipynb", *LOOP)
    policy, *others = build(lm.config, layout)
    policy = PolicyWithValueHead(policy).eval()
    rollout = collect(loop, policy, freeze(others[0]), settings=settings)
    assert rollout.input_ids.shape == (24, 4 + settings.max_new_tokens)  # the longest
    optimizer = guarded(policy, torch.optim.AdamW(free(policy).values(), lr=1e-3))
    loss = partial(loop["ppo_loss"], policy, rollout, settings)
    found = counted_memory([policy, *others], optimizer, lambda: loss()[0])
    found["weights"] += 4 * (128 + 1)  # the reward model's head is not counted
    wanted = layout_memory(lm, settings, layout, RANK)
    activations = wanted.pop("activations")
    assert activations == pytest.approx(found.pop("activations"), rel=0.15)
    assert found == wanted


def test_each_piece_of_memory_counts_once():
    x = torch.zeros(10)
    assert bytes_of([x, x.view(2, 5), x[:3], torch.zeros(1)]) == 44


@pytest.mark.parametrize("layout", [0, 2])
@pytest.mark.parametrize("size", MEASURED)
def test_the_peaks_are_those_that_were_measured(size, layout):
    """Each part and the total within 15 %, from half a million weights to 135."""
    measured = json.loads((ROOT / "docs/peaks.json").read_text("utf8"))
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(MEASURED[size])
    wanted = layout_memory(lm, MEASURED_WITH, layout, RANK)
    wanted["total"] = sum(wanted.values())
    found = measured[f"{size}, layout {layout}"]["measured"]
    assert found == pytest.approx(wanted, rel=0.15)
