"""A base in 4 bits by bitsandbytes, if it is installed, with our adapters on it."""

import copy
from importlib.util import find_spec

import pytest
import torch

from more import lora
from more.memory import NF4_BITS
from practice.cells import LOOP, import_cells
from tests.small import collect, guarded, update
from tests.test_lora import free, gpt2, llama, off
from utils.models import PolicyWithValueHead, load_causal_lm

missing = find_spec("bitsandbytes") is None
there = pytest.mark.skipif(missing, reason="bitsandbytes is not installed")
each = pytest.mark.parametrize("make, n_layers", [(gpt2, 8), (llama, 14)])


def save(folder, make, size=128):
    lm = make(size)  # with numbers as large as if it was trained
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.1) if parameter.dim() == 2 else None
    lm.save_pretrained(folder)
    return str(folder)


def gradients(lm):
    """Of fresh adapters, after a pass without gradients as in a rollout; and logits."""
    torch.manual_seed(0)
    lora.add_adapter(lm.eval(), "policy", rank=4)
    with torch.no_grad():
        lm(ids := torch.tensor([[3, 4, 5, 6, 7]]))
    logits = lm(ids).logits
    logits.log_softmax(dim=-1)[..., 1].sum().backward()
    return logits.detach(), [p.grad for p in free(lm).values()]


def test_what_cannot_be_rounded_is_said(monkeypatch, tmp_path):
    if not missing:  # rows of 96: bitsandbytes 0.50 gets them wrong, without a word
        name = save(tmp_path, gpt2, 96)
        with pytest.raises(ValueError, match="c_attn of .* has 96 inputs, .* float32"):
            lora.load_in_4_bits(name)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes accelerate"):
        lora.load_in_4_bits("any")


@there
@pytest.mark.slow
@each
def test_weights_and_gradients_are_those_of_nf4_by_hand(make, n_layers, tmp_path):
    """But for the scales, which are rounded, too; and 4.13 bits are what they take."""
    from bitsandbytes.functional import dequantize_4bit

    name, numbers, places = save(tmp_path, make), 0, 0
    rounded, plain = lora.load_in_4_bits(name), load_causal_lm(name)
    layers = {n: m for n, m in rounded.named_modules() if hasattr(m, "quant_state")}
    assert len(layers) == n_layers
    for path, layer in layers.items():
        weight, state = plain.get_submodule(path).weight.data, layer.weight.quant_state
        weight = weight.t() if make is gpt2 else weight
        wanted = lora.from_nf4(*lora.to_nf4(weight.contiguous()))
        found = dequantize_4bit(layer.weight.data, state)
        assert off(found, wanted) < 0.01 * weight.abs().max()
        assert (found == wanted).float().mean() < 1  # the scales were rounded
        numbers += weight.numel()
        places += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        weight.copy_(found)
    assert 8 * places / numbers == pytest.approx(NF4_BITS, rel=0.02)
    (logits, grads), (wanted, others) = gradients(rounded), gradients(plain)
    assert off(logits, wanted) < 1e-4
    assert len(grads) == 2 * n_layers and any(g.abs().max() > 0.1 for g in grads)
    for one, other in zip(grads, others, strict=True):
        assert off(one, other) < 1e-4 * (1 + other.abs().max())


@there
@pytest.mark.slow
@each
def test_ppo_on_a_base_in_4_bits(make, n_layers, tmp_path):
    """One base, two rollouts, and nothing of the base has moved."""
    lm = lora.load_in_4_bits(save(tmp_path, make))
    loop = import_cells("3-RLHF.ipynb", *LOOP)
    lora.add_adapter(lm, "policy", rank=4)
    policy = PolicyWithValueHead(lora.sharing(lm, "policy")).eval()
    reference, before = lora.sharing(lm, None), copy.deepcopy(lm.state_dict())
    optimizer = guarded(policy, torch.optim.AdamW(free(policy).values(), lr=1e-2))
    for learnt in (False, True):
        rollout = collect(loop, policy, reference)
        assert (off(rollout.old_logprobs, rollout.ref_logprobs) > 0) == learnt
        update(loop, policy, rollout, optimizer=optimizer)
    after = lm.state_dict()
    moved = [key for key, x in before.items() if not torch.equal(x, after[key])]
    assert moved == [key for key in before if ".adapters.policy." in key]
    with pytest.raises(ValueError, match="holds its weights in 4 bits, .* 'policy'"):
        lora.merge_adapter(lm, "policy")
