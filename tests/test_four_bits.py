"""A base in 4 bits by bitsandbytes, with our adapters on it.

Slow, and left out where the library is not installed (`pip install bitsandbytes
accelerate`); but for what is said there.
"""

import copy
import dataclasses
from importlib.util import find_spec

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.test_loop import SETTINGS, collect, guarded
from tests.test_rollout import EOS
from utils import lora, models
from utils.models import PolicyWithValueHead, load_causal_lm, load_in_4_bits
from utils.support.memory import NF4_BITS
from utils.support.notebook import import_cells

SIZES = {"bos_token_id": 0, "eos_token_id": EOS, "vocab_size": 10}
there = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def save(folder, kind, size=128):
    """A small model of random numbers, like those of a model that was trained."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_layer=2, n_head=2, n_embd=size, n_positions=64, **SIZES)
        lm = GPT2LMHeadModel(config)
    else:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": size}
        sizes |= {"intermediate_size": 192, "tie_word_embeddings": True}
        lm = LlamaForCausalLM(LlamaConfig(**sizes, **SIZES))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    lm.save_pretrained(folder)
    return str(folder)


def linear_layers(lm):
    return {n: m for n, m in lm.named_modules() if type(m).__name__ == "Linear4bit"}


@pytest.fixture(params=["gpt2", "llama"])
def name(request, tmp_path):
    return save(tmp_path / request.param, request.param)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes accelerate"):
        load_in_4_bits("any")


@there
@pytest.mark.slow
def test_the_weights_are_those_of_nf4_by_hand(name):
    """But for the scales, which are rounded, too; and 4.13 bits are what they take."""
    import bitsandbytes

    exact, rounded = load_causal_lm(name), load_in_4_bits(name)
    numbers, places = 0, 0
    for path, layer in linear_layers(rounded).items():
        weight = exact.get_submodule(path).weight
        if type(exact.get_submodule(path)).__name__ == "Conv1D":
            weight = weight.t()
        wanted = lora.from_nf4(*lora.to_nf4(weight.contiguous()))
        state = layer.weight.quant_state
        found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
        blocks = weight.reshape(-1, 64).abs().amax(dim=1).max()
        assert (found - wanted).abs().max() < 0.01 * blocks
        assert (found == wanted).float().mean() < 1  # the scales were rounded
        numbers += weight.numel()
        places += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert len(linear_layers(rounded)) in (8, 14)
    assert 8 * places / numbers == pytest.approx(NF4_BITS, rel=0.02)


@there
@pytest.mark.slow
def test_gradients_pass_through_the_base_also_after_a_rollout(name):
    """Against the same weights in float32: the adapters' gradients are equal."""
    rounded, plain = load_in_4_bits(name), load_causal_lm(name)
    import bitsandbytes

    with torch.no_grad():
        for path, layer in linear_layers(rounded).items():
            state = layer.weight.quant_state
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            own = plain.get_submodule(path).weight
            own.copy_(weight if own.shape == weight.shape else weight.t())
            if type(plain.get_submodule(path)).__name__ == "Conv1D":
                own.copy_(weight.t())
    ids, found = torch.tensor([[3, 4, 5, 6, 7]]), []
    for lm in (rounded, plain):
        torch.manual_seed(0)
        lora.add_adapter(lm.eval(), "policy", rank=4)
        with torch.no_grad():
            lm(ids)  # as a rollout does, before the update
        logits = lm(ids).logits
        logits.log_softmax(dim=-1)[..., 1].sum().backward()
        grads = [p.grad for p in lm.parameters() if p.requires_grad]
        found.append((logits.detach(), grads))
    (logits, grads), (wanted, wanted_grads) = found
    assert (logits - wanted).abs().max() < 1e-4
    assert len(grads) in (16, 28) and any(g.abs().max() > 0.1 for g in grads)
    for one, other in zip(grads, wanted_grads, strict=True):
        assert (one - other).abs().max() < 1e-4 * (1 + other.abs().max())


@there
@pytest.mark.slow
def test_ppo_on_a_base_in_4_bits(name):
    """One base, two rollouts, and nothing of the base has moved."""
    loop = import_cells("3-RLHF.ipynb", "collect-rollout", "ppo-advantages")
    loop |= import_cells("3-RLHF.ipynb", "ppo-loss", "ppo-update")
    lm = load_in_4_bits(name)
    lora.add_adapter(lm, "policy", rank=4)
    policy = PolicyWithValueHead(lora.sharing(lm, "policy")).eval()
    reference = lora.sharing(lm, None)
    before = copy.deepcopy(lm.state_dict())
    settings = dataclasses.replace(SETTINGS, ppo_lr=1e-2)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = guarded(policy, torch.optim.AdamW(trained, lr=1e-2), settings)
    kl = []
    for seed in range(2):
        rollout = collect(loop, policy, reference, seed, settings)
        kl.append((rollout.old_logprobs - rollout.ref_logprobs).abs().max())
        generator = torch.Generator().manual_seed(seed)
        loop["ppo_update"](policy, optimizer, rollout, settings, generator)
    assert kl[0] == 0 and kl[1] > 0
    after = lm.state_dict()
    moved = [key for key, x in before.items() if not torch.equal(x, after[key])]
    assert moved and all(".adapters.policy." in key for key in moved)
    with pytest.raises(ValueError, match="holds its weights in 4 bits, .* 'policy'"):
        lora.merge_adapter(lm, "policy")


@there
@pytest.mark.slow
def test_rows_of_other_sizes_are_refused(tmp_path):
    """What bitsandbytes 0.50 makes of them on a CPU is wrong, without a word."""
    name = save(tmp_path / "odd", "gpt2", size=96)
    with pytest.raises(ValueError, match="c_attn of .* has 96 inputs, .* float32"):
        load_in_4_bits(name)
