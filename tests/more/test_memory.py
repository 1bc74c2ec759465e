"""What PPO keeps in memory: worked out by hand, counted, and against real sizes."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from more import lora
from practice.cells import import_cells
from tests.more.test_lora import SHARED, free, gpt2, llama
from tests.small import SETTINGS, collect, guarded
from utils.models import PolicyWithValueHead, freeze
from utils.settings import NOTEBOOKS

EIGHT = {"bytes_of": lora.bytes_of}
EIGHT = import_cells(NOTEBOOKS["8"], "memory", "layout-memory", names=EIGHT)
layout_memory, counted_memory = EIGHT["layout_memory"], EIGHT["counted_memory"]


def test_the_weights_by_hand():
    """GPT-2 of one layer and width 8: counted from its shapes."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 4}
    lm = AutoModelForCausalLM.from_config(GPT2Config(**sizes, **SHARED))
    embeddings, norms, head = 23 * 8 + 4 * 8, 3 * 16, 9
    linear = 8 * 24 + 8 * 8 + 8 * 32 + 32 * 8
    whole = embeddings + norms + linear + 24 + 8 + 32 + 8
    adapter = 2 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)
    found = [layout_memory(lm, n, rank=2) for n in range(4)]
    weights = [3 * whole, 2 * whole + 2 * adapter, whole + 2 * adapter]
    weights += [2 * whole + adapter]
    assert [f["weights"] for f in found] == [4 * (w + 2 * head) for w in weights]
    assert found[0]["gradients"] == 4 * (whole + head)
    assert [f["gradients"] for f in found[1:]] == [4 * (adapter + head)] * 3
    assert all(f["optimiser"] == 2 * f["gradients"] for f in found)
    in_nf4 = layout_memory(lm, 2, rank=2, precision="NF4")["weights"]
    rest = 2 * (whole - linear) + 4 * (2 * adapter + 2 * head)
    assert in_nf4 == pytest.approx(linear * 4.126953125 / 8 + rest)


@pytest.mark.parametrize("layout", [0, 2])
@pytest.mark.parametrize("lm", [gpt2(128, 3), llama(128, 3)])
def test_what_is_counted_is_what_was_worked_out(loop, lm, layout):
    """Full fine-tuning and one base with two adapters; half the texts take half."""
    lms = [AutoModelForCausalLM.from_config(lm.config).eval() for _ in range(3)]
    if layout == 2:
        for name in ("reward", "policy"):
            lora.add_adapter(lms[0], name, rank=16)
        lms = [lora.sharing(lms[0], name) for name in ("policy", None, "reward")]
    policy, *others = PolicyWithValueHead(lms[0]).eval(), *lms[1:]
    rollout = collect(loop, policy, freeze(others[0]))
    optimizer = guarded(policy, torch.optim.AdamW(free(policy).values(), lr=1e-3))

    def count(batch):
        loss = partial(loop["ppo_loss"], policy, batch, SETTINGS)
        return counted_memory([policy, *others], optimizer, lambda: loss()[0])

    found, half = count(rollout), count(rollout.rows(torch.arange(len(rollout) // 2)))
    found["weights"] += 4 * (128 + 1)  # the reward model's head is not counted
    wanted = layout_memory(lm, layout, rank=16)
    activations = found.pop("activations")
    assert activations == pytest.approx(2 * half["activations"], rel=0.01)
    assert activations > 4 * 128 * 3 * rollout.input_ids.numel()  # what layers give
    assert found == wanted
