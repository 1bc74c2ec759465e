"""Models of other makes: each goes the whole way of PPO, or is refused by its name.

Small ones with random weights, of the kinds that learners might name.
"""

import copy
import dataclasses

import pytest
import torch
import transformers

from tests.test_loop import SETTINGS, score
from tests.test_preflight import Tokenizer
from tests.test_rollout import EOS, PROMPTS
from utils import inputs, models
from utils.data import pad
from utils.models import RewardModel, freeze, load_causal_lm, vocabulary_logits
from utils.rollout import response_tokens
from utils.support.notebook import LOOP, import_cells
from utils.support.preflight import preflight

pytestmark = pytest.mark.faults
COMMON = {"vocab_size": 20, "bos_token_id": EOS, "eos_token_id": EOS}
COMMON["pad_token_id"] = None
LIKE_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LIKE_GEMMA = {**LIKE_LLAMA, "head_dim": 8, "sliding_window": 16}
LIKE_BERT = {k: v for k, v in LIKE_LLAMA.items() if k != "num_key_value_heads"}
LIKE_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
LIKE_OPT = {**LIKE_BERT, "ffn_dim": 32, "word_embed_proj_dim": 16}
LIKE_OPT.pop("intermediate_size")
LIKE_FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT_350M = {"word_embed_proj_dim": 8, "do_layer_norm_before": False}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}

# The kind of a model, its sizes, and what is said of it; nothing: it works
CAPS = "scales, caps or changes its logits"
BIAS = "has a bias; take a model without one"
PADDING = "padding on the left changes what it reads"
MODELS = {
    "OPT": ("OPT", LIKE_OPT, None),
    "OPT-350m, of two sizes": ("OPT", {**LIKE_OPT, **OPT_350M}, None),
    "Granite": ("Granite", {**LIKE_LLAMA, "logits_scaling": 8.0}, CAPS),
    "Granite MoE": ("GraniteMoe", {**LIKE_LLAMA, "logits_scaling": 8.0}, CAPS),
    "Cohere": ("Cohere", LIKE_LLAMA, CAPS),
    "Gemma 2": ("Gemma2", LIKE_GEMMA, CAPS),
    "Gemma 3": ("Gemma3Text", LIKE_GEMMA, None),
    "Mistral": ("Mistral", {**LIKE_LLAMA, "sliding_window": 4}, None),
    "Mixtral": ("Mixtral", LIKE_LLAMA, None),
    "Qwen 2": ("Qwen2", LIKE_LLAMA, None),
    "Qwen 3": ("Qwen3", {**LIKE_LLAMA, "head_dim": 8}, None),
    "OLMo 2": ("Olmo2", LIKE_LLAMA, None),
    "StableLM": ("StableLm", LIKE_LLAMA, None),
    "Pythia (GPT-NeoX)": ("GPTNeoX", LIKE_BERT, None),
    "BLOOM, without positions": ("Bloom", LIKE_GPT2, None),
    "Falcon": ("Falcon", LIKE_FALCON, None),
    "Phi 2": ("Phi", LIKE_LLAMA, BIAS),
    "GPT-J": ("GPTJ", {**LIKE_GPT2, "rotary_dim": 4}, BIAS),
    "RWKV": ("Rwkv", MAMBA | {"attention_hidden_size": 16}, PADDING),
    "Mamba": ("Mamba", MAMBA, "cannot be read as|reads otherwise with a cache|padding"),
}
MODELS["BLOOM, without positions"][1].update(hidden_size=16)


@pytest.fixture
def saved(tmp_path):
    """`saved(kind, sizes)`: a folder with such a model, far from uniform."""

    def save(kind, sizes):
        config = getattr(transformers, f"{kind}Config")(**{**COMMON, **sizes})
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(config)
        for weight in lm.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        lm.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_the_whole_way_or_is_refused(saved, survived, name):
    kind, sizes, fault = MODELS[name]
    folder = saved(kind, sizes)
    if fault:
        with pytest.raises(ValueError, match=fault) as caught:
            load_causal_lm(folder)
        said = str(caught.value)
        assert "\n" not in said and (folder in said or kind in said)
        survived(f"model: {name}", said)
        return
    survived(f"model: {name}", goes_the_whole_way(folder))


def goes_the_whole_way(folder):
    """Loaded, sampled from, looked at, and moved one update."""
    loop = import_cells("3-RLHF.ipynb", *LOOP)
    reference = freeze(load_causal_lm(folder))
    reward_model = freeze(RewardModel.from_pretrained(folder))
    run = loop["fresh_run"](copy.deepcopy(reference).requires_grad_(), SETTINGS)
    rollout = loop["collect_rollout"](
        run.policy, reference, score, PROMPTS * 8, EOS, SETTINGS, run.generator
    )
    start = (run.policy, reference, reward_model, run.optimizer, rollout, Tokenizer())
    texts = response_tokens(rollout.input_ids, rollout.mask)
    anyway = dataclasses.replace(SETTINGS, train_anyway=1)  # with random weights
    preflight(*start, anyway, texts, folder)  # the ratio is 1, and more
    off = far_from_its_own(reference, rollout)
    assert off <= 1e-5
    before = copy.deepcopy(run.policy.lm)
    rollout = loop["ppo_advantages"](rollout, SETTINGS, 0.1)
    loop["ppo_update"](run.policy, run.optimizer, rollout, SETTINGS, run.generator)
    moved = zip(before.parameters(), run.policy.lm.parameters(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in moved) > 5
    return f"works; log-probabilities differ from its own by {off:.0e}"


@torch.no_grad()
def far_from_its_own(lm, rollout):
    """How far log-probabilities are from the model's own logits of each text alone."""
    worst = 0.0
    for i in range(len(rollout)):
        text = rollout.input_ids[i][rollout.attention_mask[i].bool()]
        n = int(rollout.mask[i].sum())
        logits = lm(text[None], use_cache=False).logits[0, :-1]
        own = logits.log_softmax(dim=-1).gather(1, text[1:, None])[-n:, 0]
        worst = max(worst, (own - rollout.ref_logprobs[i, :n]).abs().max().item())
    return worst


def test_a_cap_that_changes_nothing_yet_is_found(saved):
    """Logits near 0 pass a cap of 30 unchanged; training would make them larger."""
    folder = saved("Gemma2", LIKE_GEMMA)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(1e-3)
    lm.save_pretrained(folder)
    with pytest.raises(ValueError, match=CAPS):
        load_causal_lm(folder)


def test_what_a_model_raises_when_tried_is_one_sentence(saved, monkeypatch):
    folder = saved("Llama", LIKE_LLAMA)

    def fail(*_, **__):
        raise TypeError("got an unexpected keyword\nand more")

    monkeypatch.setattr(models, "next_hidden_states", fail)
    says = r"cannot be read as .* \(TypeError: got an unexpected keyword\); name"
    with pytest.raises(ValueError, match=says) as caught:
        load_causal_lm(folder)
    assert "\n" not in str(caught.value)


def test_a_broken_cache_is_found(saved, monkeypatch):
    """As of a model that forgets what came before."""
    folder = saved("Llama", LIKE_LLAMA)
    real = models.next_hidden_states

    def forget(trunk, ids, mask, start, cache):
        return real(trunk, ids[:, start:], mask[:, start:], 0, None)

    monkeypatch.setattr(models, "next_hidden_states", forget)
    with pytest.raises(ValueError, match="it reads otherwise with a cache"):
        load_causal_lm(folder)


def test_trying_a_model_out_draws_nothing_and_changes_nothing(saved):
    """Else the seeded figures of every run would depend on it."""
    folder = saved("GPT2", LIKE_GPT2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lm = load_causal_lm(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not lm.get_output_embeddings()._forward_pre_hooks
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, lm.get_parameter(name))


def test_the_rounding_of_large_numbers_passes():
    large = torch.full((3,), 1000.0)
    inputs.check_alike(large + 0.5, large, "a", "b")
    for off in (1.5, float("nan")):
        with pytest.raises(ValueError, match="'a' cannot be used here: b"):
            inputs.check_alike(large + off, large, "a", "b")


def test_the_reward_head_of_a_model_of_two_sizes(saved):
    """OPT-350m's words have 512 numbers and its layers 1,024."""
    lm = load_causal_lm(saved("OPT", {**LIKE_OPT, **OPT_350M}))
    assert lm.config.hidden_size == 16
    model = freeze(RewardModel(lm.base_model))
    assert model.head.in_features == 8
    assert model(*pad(PROMPTS, EOS, side="left")).shape == (3,)
    assert vocabulary_logits(lm, torch.ones(8)).shape == (20,)


def test_a_training_trunk_keeps_its_mode_and_its_dropout():
    config = transformers.GPT2Config(**{**COMMON, **LIKE_GPT2})
    trunk = transformers.GPT2Model(config).train()
    state = torch.get_rng_state()
    assert models.states_size(trunk) == 16
    assert trunk.training and torch.equal(torch.get_rng_state(), state)
