"""Adapters by hand: nothing changes until they learn, and nothing but them learns."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from utils import lora


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, **sizes)).eval()


def llama():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    sizes |= {"intermediate_size": 24, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, **sizes)).eval()


IDS = torch.arange(12).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def learn(model, seed=1):
    """Give every adapter's B numbers, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key or "embedding_A" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(params=[gpt2, llama])
def model(request):
    return request.param()


def test_by_hand():
    """Rank 1 on 2 x 3, alpha 4: s B A x = 4 (1, -2) (0.5, 0, 1) . x"""
    for layer in (nn.Linear(3, 2), Conv1D(2, 3)):
        adapted = lora.AdaptedLayer(layer)
        adapted.adapters["a"] = lora.Adapter(3, 2, 1, 4.0, layer.weight)
        adapted.adapters["a"].lora_A.weight.data = torch.tensor([[0.5, 0.0, 1.0]])
        adapted.adapters["a"].lora_B.weight.data = torch.tensor([[1.0], [-2.0]])
        x = torch.tensor([[1.0, 5.0, -2.0]])
        assert torch.equal(adapted(x), layer(x))
        adapted.on = "a"
        difference = adapted(x) - layer(x)
        assert difference[0].tolist() == pytest.approx([4 * -1.5, 4 * 3.0], rel=1e-5)


def test_a_fresh_adapter_changes_nothing_and_off_is_the_base(model):
    before = logits(model)
    lora.add_adapter(model, "one", rank=4)
    assert torch.equal(logits(model), before)
    learn(model)
    assert (logits(model) - before).abs().max() > 1e-2
    with lora.using(model, None):
        assert torch.equal(logits(model), before)
    assert (logits(model) - before).abs().max() > 1e-2


def test_only_adapters_learn_and_the_base_stays_bit_for_bit(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lora.add_adapter(model, "one", rank=2, alpha=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".adapters.one.lora_" in k for k in names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = {k.replace(".base.", "."): v for k, v in model.state_dict().items()}
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert all((p != 0).any() for p in trained)


def test_the_sizes_are_those_of_the_formula():
    model = lora.add_adapter(gpt2(), "one", rank=3)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # of a layer of GPT-2: (16, 48), (16, 16), (16, 64), (64, 16)
    assert count == 2 * 3 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert not any("lm_head" in k for k in lora._adapted(model))


def test_alpha_over_r_and_over_its_root():
    for stabilised, scale in ((False, 16 / 4), (True, 16 / 2)):
        model = lora.add_adapter(gpt2(), "one", 4, 16, rank_stabilised=stabilised)
        assert {m.adapters["one"].scale for m in lora._adapted(model).values()} == {
            scale
        }


def test_several_adapters_and_which_is_on(model):
    base = logits(model)
    lora.add_adapter(model, "policy", rank=2)
    lora.add_adapter(model, "reward", rank=3)
    learn(model)
    assert lora.adapter_names(model) == ["policy", "reward"]
    outputs = {None: base}
    for name in ("policy", "reward"):
        with lora.using(model, name):
            outputs[name] = logits(model)
    assert torch.equal(logits(model), outputs["reward"])  # the last one is on
    for a, b in (("policy", "reward"), (None, "policy"), (None, "reward")):
        assert (outputs[a] - outputs[b]).abs().max() > 1e-2
    lora.switch(model, "policy")
    with pytest.raises(KeyError, match="inside"), lora.using(model, None):
        with lora.using(model, "reward"):
            assert torch.equal(logits(model), outputs["reward"])
        assert torch.equal(logits(model), base)
        raise KeyError("inside")
    assert torch.equal(logits(model), outputs["policy"])


def test_an_adapter_on_some_layers_leaves_the_others_to_the_base():
    model = lora.add_adapter(gpt2(), "one", targets=["c_attn", "h.1.mlp.c_fc"])
    assert sorted(lora._adapted(model)) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.mlp.c_fc",
    ]
    lora.add_adapter(model, "two", targets=["c_fc"])
    learn(model)
    with lora.using(model, "two"):
        on = [name for name, layer in lora._adapted(model).items() if layer.on]
    assert sorted(on) == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]


def test_merged_it_is_a_plain_model_again(model):
    plain = copy.deepcopy(model)
    learn(lora.add_adapter(model, "one", rank=4))
    wanted = logits(model)
    lora.merge_adapter(model, "one")
    assert (logits(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (logits(plain) - wanted).abs().max() > 1e-2
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no adapter 'one'; it has none"):
        lora.merge_adapter(model, "one")  # twice would count it twice


def test_merging_one_leaves_the_other_on_top():
    model = gpt2()
    for name in ("sft", "policy"):
        lora.add_adapter(model, name, rank=2)
    learn(model)
    with lora.using(model, "sft"):
        reference = logits(model)
    lora.merge_adapter(model, "sft")
    with lora.using(model, None):
        assert (logits(model) - reference).abs().max() < 1e-4
    assert lora.adapter_names(model) == ["policy"]
    assert not any(p.requires_grad for k, p in model.named_parameters() if "base" in k)


def test_one_layer_with_matrices_of_ones_own():
    """2 x 2, alpha 6, rank 1: s = 6; merged by hand, for both ways to store W."""
    W = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    A, B = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5], [0.0]])
    linear, conv = nn.Linear(2, 2, bias=False), Conv1D(2, 2)
    linear.weight.data, conv.weight.data = W.clone(), W.t().clone()
    merged = torch.tensor([[1.0 + 3.0, 2.0 - 3.0], [0.0, 1.0]])
    x = torch.tensor([[1.0, 3.0]])
    for layer, stored in ((linear, merged), (conv, merged.t())):
        assert torch.equal(lora.merged_weight(layer, A, B, 6), stored)
        adapted = lora.adapted_layer(layer, A, B, 6)
        assert adapted(x).tolist() == [[4.0 - 3.0, 3.0]]
        assert layer(x).tolist() == [[7.0, 3.0]]  # it stays as it was


def test_sharing_is_another_model_on_the_same_weights(model):
    base = logits(model)
    lora.add_adapter(model, "policy", rank=2)
    lora.add_adapter(model, "reward", rank=3)
    learn(model)
    twins = {name: lora.sharing(model, name) for name in (None, "policy", "reward")}
    lora.switch(model, None)  # which is nothing to the twins
    for name, twin in twins.items():
        with lora.using(model, name):
            assert torch.equal(logits(model), logits(twin)), name
        held = {p.data_ptr() for p in model.parameters()}
        assert all(p.data_ptr() in held for p in twin.parameters())
    assert torch.equal(logits(twins[None]), base)
    assert lora.adapter_names(twins[None]) == []
    assert lora.adapter_names(twins["policy"]) == ["policy"]
    learn(model, seed=5)  # what the model learns, its twins show
    with lora.using(model, "policy"):
        assert torch.equal(logits(model), logits(twins["policy"]))
    with pytest.raises(ValueError, match="no adapter 'sft'; it has policy, reward"):
        lora.sharing(model, "sft")


def test_another_adapter_stays_frozen_if_it_was():
    model = lora.add_adapter(gpt2(), "reward", rank=2)
    for key, weight in model.named_parameters():
        weight.requires_grad_("nothing" in key)
    lora.add_adapter(model, "policy", rank=2)
    free = [key for key, p in model.named_parameters() if p.requires_grad]
    assert free and all(".adapters.policy." in key for key in free)


def test_an_adapter_beside_the_embedding():
    """Word 5 gets s B A_5 more; the projection to the vocabulary stays as it is."""
    model, everything = gpt2(), ["wte", "c_attn"]
    before = logits(model)
    lora.add_adapter(model, "one", rank=2, alpha=6, targets=everything)
    assert torch.equal(logits(model), before)
    wte = model.transformer.wte
    A, B = wte.adapters["one"].parameters()
    with torch.no_grad():
        A.copy_(torch.arange(46.0).view(2, 23) / 50)
    added = (wte(IDS) - wte.base(IDS))[0, 5]
    assert added.tolist() == pytest.approx((3 * B @ A[:, IDS[0, 5]]).tolist(), rel=1e-4)
    assert model.lm_head.weight is wte.base.weight
    assert (logits(model) - before).abs().max() > 1e-2
    with lora.using(model, None):
        assert torch.equal(logits(model), before)
    with pytest.raises(
        ValueError, match="transformer.wte has one weight with the proj"
    ):
        lora.merge_adapter(model, "one")


def test_an_embedding_of_its_own_is_merged():
    model = lora.add_adapter(llama(), "one", rank=2, targets=["embed_tokens"])
    with torch.no_grad():
        next(iter(model.model.embed_tokens.adapters["one"].parameters())).normal_()
    wanted = logits(model)
    lora.merge_adapter(model, "one")
    assert (logits(model) - wanted).abs().max() <= 1e-5
    assert not lora.adapter_names(model)


def test_half_precision_weights_keep_their_type_and_the_adapter_its_own():
    model = lora.add_adapter(gpt2().bfloat16(), "one", rank=2)
    learn(model)
    assert model(IDS).logits.dtype == torch.bfloat16
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert layer.adapters["one"].lora_A.weight.dtype == torch.float32
    lora.merge_adapter(model, "one")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_files_there_and_back(model, tmp_path):
    other = copy.deepcopy(model)
    wte = "wte" if isinstance(model, GPT2LMHeadModel) else "embed_tokens"
    targets = [wte, "c_fc" if wte == "wte" else "o_proj"]
    options = {"targets": targets, "rank_stabilised": True}
    learn(lora.add_adapter(model, "one", rank=4, alpha=12, **options))
    lora.save_adapter(model, "one", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [lora.CONFIG, lora.WEIGHTS]
    lora.load_adapter(other, "another", tmp_path)
    assert (logits(other) - logits(model)).abs().max() <= 1e-6


def test_peft_reads_ours_and_we_read_its(model, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    wte = "wte" if isinstance(model, GPT2LMHeadModel) else "embed_tokens"
    some = [wte, "c_attn", "c_fc"] if wte == "wte" else [wte, "q_proj", "o_proj"]
    learn(lora.add_adapter(ours, "one", rank=4, alpha=12, targets=some))
    lora.save_adapter(ours, "one", tmp_path / "ours")
    found = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert (logits(found) - logits(ours)).abs().max() <= 1e-6
    options = {"fan_in_fan_out": isinstance(model, GPT2LMHeadModel)}
    targets = ["c_attn", "c_fc"] if options["fan_in_fan_out"] else ["q_proj", "up_proj"]
    for stabilised in (False, True):
        if stabilised:  # an embedding besides
            targets.append("wte" if options["fan_in_fan_out"] else "embed_tokens")
        config = peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=targets, use_rslora=stabilised, **options
        )
        made = learn(peft.get_peft_model(copy.deepcopy(theirs), config))
        made.save_pretrained(tmp_path / f"theirs {stabilised}")
        read = lora.load_adapter(
            copy.deepcopy(model), "x", tmp_path / f"theirs {stabilised}"
        )
        assert (logits(made) - logits(model)).abs().max() > 1e-2
        assert (logits(read) - logits(made)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rank": 0}, "must be 1 or more, got 0"),
        (
            {"targets": ["q_proj"]},
            "no layer is called 'q_proj'; take targets from c_at",
        ),
        ({"targets": ["attn"]}, "no layer is called 'attn'"),
        ({"name": "a.b"}, "cannot be called 'a.b'"),
        ({"name": "taken"}, r"none of \['taken'\]"),
    ],
)
def test_what_cannot_be_added_is_said_and_changes_nothing(options, says):
    model = lora.add_adapter(gpt2(), "taken", targets=["c_fc"])
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=says):
        lora.add_adapter(model, **{"name": "new", **options})
    assert list(model.state_dict()) == keys


def test_an_adapter_that_is_not_there_is_named():
    model = lora.add_adapter(gpt2(), "one")
    for call in (lora.switch, lora.merge_adapter):
        with pytest.raises(ValueError, match="no adapter 'two'; it has one"):
            call(model, "two")
    with pytest.raises(ValueError, match="no adapter 'two'"), lora.using(model, "two"):
        pass
    with pytest.raises(ValueError, match="no adapter 'two'"):
        lora.save_adapter(model, "two", "nowhere")
    assert next(iter(lora._adapted(model).values())).on == "one"


def test_files_that_do_not_fit_are_said_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        lora.load_adapter(gpt2(), "one", tmp_path)
    model = lora.add_adapter(gpt2(), "one", rank=2, targets=["c_fc"])
    lora.save_adapter(model, "one", tmp_path)
    with pytest.raises(
        ValueError, match="belongs to a layer 'transformer.h.0.mlp.c_fc"
    ):
        lora.load_adapter(llama(), "one", tmp_path)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16}
    smaller = GPT2LMHeadModel(GPT2Config(vocab_size=23, **sizes))
    with pytest.raises(ValueError, match=r"has the shape \(2, 16\).* takes \(2, 8\)"):
        lora.load_adapter(smaller, "one", tmp_path)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    for change, says in (
        ({"r": 5}, r"rank 5 on this model takes \(5, 16\)"),
        ({"peft_type": "IA3"}, "holds a IA3"),
        ({"use_dora": True}, "needs use_dora"),
        ({"bias": "all"}, "needs trained biases"),
    ):
        (tmp_path / lora.CONFIG).write_text(json.dumps(config | change))
        fresh = gpt2()
        with pytest.raises(ValueError, match=says):
            lora.load_adapter(fresh, "one", tmp_path)
        assert not lora.adapter_names(fresh)


def test_a_is_drawn_as_a_linear_layer_is():
    torch.manual_seed(3)
    adapter = lora.Adapter(400, 5, 300, 1.0, torch.empty(0))
    bound = math.sqrt(1 / 400)
    assert adapter.lora_A.weight.abs().max() <= bound
    assert adapter.lora_A.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not adapter.lora_B.weight.any()


def test_nf4_has_the_published_levels():
    """As printed in appendix E of the paper."""
    below = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734]
    below += [-0.0910500, 0.0]
    above = [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170]
    above += [0.7229568, 1.0]
    assert lora.nf4_levels().tolist() == pytest.approx(below + above, abs=2e-7)


def test_nf4_by_hand_and_the_nearest_of_all_levels():
    x = torch.tensor([[2.0, -0.5, 0.3, 0.0], [-0.1, 0.1, 0.05, -0.03]])
    codes, scales = lora.to_nf4(x, block=4)
    assert scales.tolist() == pytest.approx([2.0, 0.1])
    # -0.25 is nearest to -0.284, 0.15 to 0.161; 0.5 to 0.441 or 0.563: 0.441; -0.3
    assert codes.tolist() == [[15, 4, 9, 7], [0, 15, 12, 4]]
    torch.manual_seed(0)
    x = torch.randn(6, 64)
    codes, scales = lora.to_nf4(x)
    levels = lora.nf4_levels()
    near = (x[..., None] / scales[:, None, None] - levels).abs().argmin(dim=-1)
    assert torch.equal(codes, near)
    back = lora.from_nf4(codes, scales)
    assert torch.equal(back, levels[near] * scales[:, None])
    with pytest.raises(ValueError, match="10 numbers are no whole blocks of 64"):
        lora.to_nf4(torch.zeros(10))
    zeros = torch.zeros(64)
    assert torch.equal(lora.from_nf4(*lora.to_nf4(zeros)), zeros)
