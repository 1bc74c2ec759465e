"""Adapters by hand: nothing changes until they learn, and nothing but them learns."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from more import lora
from practice.cells import import_cells
from tests.conftest import refused
from tests.small import EOS, SETTINGS, collect, small_lm
from utils.models import PolicyWithValueHead, RewardModel, freeze
from utils.settings import NOTEBOOKS

SHARED = {"bos_token_id": 0, "eos_token_id": EOS, "vocab_size": 23}
IDS = torch.arange(12).view(2, 6)


def gpt2(size=16, layers=2):
    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_head": 2, "n_embd": size, "n_positions": 64}
    sizes["activation_function"] = "gelu_pytorch_tanh"
    return GPT2LMHeadModel(GPT2Config(**sizes, **SHARED)).eval()


def llama(size=16, layers=2):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_size": size}
    sizes |= {"intermediate_size": 3 * size // 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **SHARED, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def off(a, b):
    return (a - b).abs().max().item()


def learn(model, name="", seed=1):
    """Give every adapter's B, or that of this one, numbers as training would."""
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        if "lora_B" in key and name in key:
            torch.nn.init.normal_(weight, generator=generator)
    return model


def free(model):
    return {key: p for key, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=[gpt2, llama])
def model(request):
    return request.param()


@pytest.fixture
def two(model):
    """With two adapters that have learnt, and its logits under each."""
    outputs = {None: logits(model)}
    for rank, name in enumerate(("policy", "reward"), start=2):
        lora.add_adapter(model, name, rank, alpha=5 + rank)
        learn(model, f".{name}.", seed=rank)
        outputs[name] = logits(model)
    return model, outputs


def test_fresh_it_changes_nothing_and_only_it_learns(model):
    start, before = logits(model), copy.deepcopy(model.state_dict())
    lora.add_adapter(model, "one", rank=4)
    assert torch.equal(logits(model), start)
    optimizer, trained = torch.optim.AdamW(model.parameters(), lr=0.1), free(model)
    assert trained and all(".adapters.one.lora_" in key for key in trained)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = {k.replace(".base.", "."): v for k, v in model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all((p != 0).any() for p in trained.values())
    assert off(logits(model), start) > 1e-2
    with lora.using(model, None):
        assert torch.equal(logits(model), start)
    torch.manual_seed(3)  # A is drawn as a linear layer is
    A = lora.Adapter(400, 5, 300, 1.0, torch.empty(0)).lora_A.weight
    assert A.abs().max() <= 0.05 and A.std().item() == pytest.approx(0.0289, rel=0.02)


def test_rank_alpha_and_targets_are_those_that_were_asked_for():
    model = lora.add_adapter(gpt2(), "all", rank=3, alpha=12)
    assert {x.adapters["all"].scale for x in lora._adapted(model).values()} == {12 / 3}
    lora.add_adapter(model, "some", targets=["c_attn", "h.1.mlp.c_fc"])
    on = [path[14:] for path, layer in lora._adapted(model).items() if layer.on]
    assert on == ["0.attn.c_attn", "1.attn.c_attn", "1.mlp.c_fc"]
    # what could be trained still can, and a rank of 1 is one
    assert len(free(lora.add_adapter(model, "least", rank=1))) == 2 * (8 + 3 + 8)


def test_which_is_on_and_sharing_is_another_model_on_the_same_weights(two):
    model, outputs = two
    assert lora.adapter_names(model) == ["policy", "reward"]
    for a, b in (("policy", "reward"), (None, "policy"), (None, "reward")):
        assert off(outputs[a], outputs[b]) > 1e-2
    twins = {name: lora.sharing(model, name) for name in outputs}
    lora.switch(model, "policy")  # which is nothing to the twins
    with pytest.raises(KeyError, match="inside"), lora.using(model, None):
        with lora.using(model, "reward"):
            assert torch.equal(logits(model), outputs["reward"])
        assert torch.equal(logits(model), outputs[None])
        raise KeyError("inside")
    assert torch.equal(logits(model), outputs["policy"])
    held = {p.data_ptr() for p in model.parameters()}
    x = torch.zeros(3, 4)
    assert lora.bytes_of([x, x[1:], x.t(), torch.zeros(2)]) == 4 * (12 + 2)
    for name, twin in twins.items():
        assert torch.equal(logits(twin), outputs[name]), name
        assert all(p.data_ptr() in held for p in twin.parameters())
        assert lora.adapter_names(twin) == ([name] if name else [])
    learn(model, seed=5)  # what the model learns, its twins show
    assert torch.equal(logits(model), logits(twins["policy"]))
    assert off(logits(model), outputs["policy"]) > 1e-2


def test_merged_it_is_a_plain_model_again(two):
    model, outputs = two
    lora.switch(model, "policy")
    assert lora.merge_adapter(model, "reward") is model
    assert {x.on for x in lora._adapted(model).values()} == {"policy"}
    with lora.using(model, None):
        assert off(logits(model), outputs["reward"]) <= 1e-4
    assert not any("base" in key for key in free(model))
    lora.add_adapter(model, "third", rank=2)
    lora.switch(model, "policy")
    lora.merge_adapter(model, "policy")
    assert {x.on for x in lora._adapted(model).values()} == {None}
    lora.merge_adapter(model, "third")
    assert list(model.state_dict()) == list(type(model)(model.config).state_dict())
    assert all(p.requires_grad for p in model.parameters())
    half = learn(lora.add_adapter(model.bfloat16(), "one", rank=2))
    assert {p.dtype for p in free(half).values()} == {torch.float32}
    assert logits(half).dtype == torch.bfloat16


def test_peft_reads_ours_and_we_read_its(model, tmp_path):
    base, transposed = logits(model), isinstance(model, GPT2LMHeadModel)
    targets = ["c_attn", "c_fc"] if transposed else ["q_proj", "up_proj"]
    ours = learn(lora.add_adapter(copy.deepcopy(model), "one", 4, 12, targets))
    lora.save_adapter(ours, "one", tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert off(logits(read), logits(ours)) <= 1e-6
    options = {"target_modules": targets, "fan_in_fan_out": transposed}
    config = peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, **options)
    theirs = learn(peft.get_peft_model(copy.deepcopy(model), config))
    theirs.save_pretrained(tmp_path / "theirs")
    for made, folder in ((ours, "ours"), (theirs, "theirs")):
        assert off(logits(made), base) > 1e-2
        twin = lora.load_adapter(copy.deepcopy(model), "x", tmp_path / folder)
        assert off(logits(twin), logits(made)) <= 1e-6


def test_what_is_not_read_is_refused_in_a_sentence(tmp_path):
    made, fresh = lora.add_adapter(gpt2(), "one", rank=2, targets=["c_fc"]), gpt2()
    lora.save_adapter(made, "one", tmp_path)
    config, weights = tmp_path / lora.CONFIG, tmp_path / lora.WEIGHTS
    plain, tensors = json.loads(config.read_text()), load_file(weights)
    fewer = {name: x for name, x in tensors.items() if "lora_A" in name}
    for changes, written, says in (
        ({}, fewer, "c_fc.lora_B.weight of none"),
        ({"some_new_way": 1}, tensors, "not read here, {'some_new_way': 1}; merge it"),
        ({"r": 5}, tensors, r"c_fc.lora_A.* of \(2, 16\), .* give \(5, 16\); take"),
        ({}, {**tensors, "wte.lora_A": torch.zeros(1)}, "wte.lora_A of .* no layer"),
    ):
        config.write_text(json.dumps(plain | changes))
        save_file(written, weights)
        refused(says, lora.load_adapter, fresh, "one", tmp_path)
    weights.write_bytes(b"cut off")
    says = "cannot load the adapter .*SafetensorError.*make it anew"
    refused(says, lora.load_adapter, fresh, "one", tmp_path)
    assert not lora.adapter_names(fresh)


def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path):
    model = lora.add_adapter(gpt2(), "one", targets=["c_fc"])
    keys, add = list(model.state_dict()), partial(lora.add_adapter, model)
    refused("must be 1 or more, got 0", add, "two", rank=0)
    says = "no layer is called 'wte'; take targets from c_attn, c_fc"
    refused(says, add, "two", targets=["c_fc", "wte"])
    refused("'a.b' is empty, dotted or one of", add, "a.b")
    refused(r"'one' is .* one of \['one'\]; change it", add, "one")
    save = partial(lora.save_adapter, folder=tmp_path)
    for call in (lora.switch, lora.merge_adapter, lora.sharing, save):
        refused("no adapter 'two'; it has one", call, model, "two")
    assert list(model.state_dict()) == keys
    assert {layer.on for layer in lora._adapted(model).values()} == {"one"}


class OneBase:
    """Policy, reference and reward model on the weights of one model."""

    def __init__(self):
        self.lm = small_lm().float()
        for name in ("reward", "policy"):
            lora.add_adapter(self.lm, name, rank=2)
        learn(self.lm, ".reward.")
        self.policy = PolicyWithValueHead(lora.sharing(self.lm, "policy")).eval()
        self.reference = freeze(lora.sharing(self.lm, None))
        judged_by("reward")(self)

    def score(self, ids, attention, mask):
        raw = self.judge(ids, attention)
        return raw, raw / 10


def judged_by(name, *of):
    def infect(start):
        torch.manual_seed(0)  # for the head
        model = RewardModel(lora.sharing(start.lm, name).base_model).float().eval()
        model = model if name == "policy" else freeze(model)
        for part in of or ("reward_model", "judge"):  # the judge scores the rollout
            setattr(start, part, model)

    return infect


WORDS = ("dropout", "nothing that is", "one adapter", "KL", "scores")


def unmerged(start):
    """SFT's adapter: with adapters off, the pre-trained model is left."""
    learn(start.lm, ".policy.")
    start.reference = freeze(lora.sharing(start.lm, "reward"))
    learn(start.lm, ".reward.", seed=2)


SICK = [  # and which of these sentences are not so
    (lambda s: None, ()),
    (lambda s: s.policy.train(), (0, 3)),
    # A fresh adapter gives a KL of 0: only its weights tell
    (lambda s: setattr(s, "reference", lora.sharing(s.lm, "policy").eval()), (1,)),
    (unmerged, (3,)),
    (lambda s: s.lm.transformer.wte.requires_grad_(True), (1, 2)),
    (lambda s: lora.switch(s.policy.lm, None), (2,)),
    (judged_by(None), (4,)),
    (judged_by("policy"), (1,)),
    (judged_by(None, "judge"), (4,)),
]


@pytest.mark.parametrize("infect, wrong", SICK)
def test_a_sick_start_is_named_and_a_healthy_one_is_not(loop, infect, wrong):
    start = OneBase()
    checks = import_cells(NOTEBOOKS["8"], "adapter-checks")["adapter_checks"]
    infect(start)
    rollout = collect(loop, start.policy, start.reference, by=start.score)
    models = (start.policy, start.reference, start.reward_model)
    pairs = checks(*models, rollout, SETTINGS)
    assert all(word in said for word, (said, _) in zip(WORDS, pairs, strict=True))
    assert tuple(i for i, (_, good) in enumerate(pairs) if not good) == wrong


def test_nf4_has_the_published_levels_and_takes_the_nearest():
    """As printed in appendix E of the paper."""
    levels = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734]
    levels += [-0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098]
    levels += [0.5626170, 0.7229568, 1.0]
    eight = SimpleNamespace(**import_cells(NOTEBOOKS["8"], "nf4-functions"))
    assert eight.LEVELS.tolist() == pytest.approx(levels, abs=2e-7)
    x = torch.tensor([[2.0, -0.5, 0.3, 0.0], [-0.1, 0.1, 0.05, -0.03]])
    codes, scales = eight.to_nf4(x, block=4)
    assert scales.tolist() == pytest.approx([2.0, 0.1])
    # -0.25 is nearest to -0.284, 0.15 to 0.161; 0.5 to 0.441 or 0.563: 0.441; -0.3
    assert codes.tolist() == [[15, 4, 9, 7], [0, 15, 12, 4]]
    wanted = [[2.0, -0.5688, 0.3219, 0.0], [-0.1, 0.1, 0.0441, -0.0284]]
    found = eight.from_nf4(codes, scales)
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-4)
    assert not eight.from_nf4(*eight.to_nf4(torch.zeros(64))).any()
