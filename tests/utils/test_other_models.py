"""Models of other makes: each goes the whole way of PPO, or is refused by its name.

Small ones with random weights, of the kinds that learners might name.
"""

import pytest
import torch
import transformers

from tests.conftest import refused
from tests.small import EOS, PROMPTS
from utils.data import pad
from utils.models import PolicyWithValueHead, RewardModel, freeze, load_causal_lm
from utils.rollout import evaluate_responses, response_logprobs, sample_responses

pytestmark = pytest.mark.faults
COMMON = {"vocab_size": 20, "bos_token_id": EOS, "eos_token_id": EOS}
COMMON["pad_token_id"] = None
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
# OPT-350m's words have 512 numbers and its layers 1,024
OPT_350M = {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 8}
OPT_350M |= {"do_layer_norm_before": False}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}

# The kind of a model, its sizes, and what is said of it; nothing: it works. Refused are
# logits that are scaled or have a bias, a look ahead, and a state in place of a cache
DIFFER = "its logits differ"
MODELS = {
    "OPT-350m, of two sizes": ("OPT", OPT_350M, None),
    "Mistral": ("Mistral", {**LLAMA, "sliding_window": 4}, None),
    "Pythia (GPT-NeoX)": ("GPTNeoX", BERT, None),
    "BLOOM, without positions": ("Bloom", {**GPT2, "hidden_size": 16}, None),
    "Granite": ("Granite", {**LLAMA, "logits_scaling": 8.0}, DIFFER),
    "Phi 2": ("Phi", LLAMA, DIFFER),
    "BERT": ("Bert", BERT, DIFFER),
    "Mamba": ("Mamba", MAMBA, "its logits differ|Error: "),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_the_whole_way_or_is_refused(tmp_path, name):
    """Loaded, sampled from, scored, looked at, and moved; it is far from uniform."""
    (kind, sizes, fault), folder = MODELS[name], str(tmp_path)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **sizes})
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    lm.save_pretrained(folder)
    if fault:
        refused(f"{folder}.*({fault}).*name another", load_causal_lm, folder)
        return
    lm, reward_model = load_causal_lm(folder), RewardModel.from_pretrained(folder)
    prompts, random = pad(PROMPTS * 8, EOS, "left"), torch.Generator().manual_seed(0)
    texts = sample_responses(lm, *prompts, EOS, 6, 1.0, random)
    assert reward_model(*texts[:2]).isfinite().all()
    policy, width = PolicyWithValueHead(lm), sizes.get("word_embed_proj_dim", 16)
    assert reward_model.head.in_features == policy.value_head.in_features == width
    ours, values = evaluate_responses(policy, *texts, 1.0)
    theirs = response_logprobs(freeze(load_causal_lm(folder)), *texts, 1.0)
    for ids, attention, mask, *both in zip(*texts, ours, theirs, strict=True):
        text, n = ids[attention.bool()], int(mask.sum())
        logits = lm(text[None], use_cache=False).logits[0, :-1].detach()
        own = logits.log_softmax(dim=-1).gather(1, text[1:, None])[-n:, 0]
        assert all((own - found[:n]).abs().max() <= 1e-5 for found in both)
    (ours.sum() + values.sum()).backward()
    assert sum(p.grad.any() for p in policy.parameters() if p.grad is not None) > 5
