import math

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from utils.data import pad
from utils.models import (
    RewardHead,
    RewardModel,
    ValueHead,
    freeze,
    hidden_states,
    load_causal_lm,
    position_ids,
    vocabulary_logits,
    vocabulary_weight,
)

ROWS = [[5, 6, 7, 8, 9], [3], [4, 2], [1, 2, 3, 4]]


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes, **changes)).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def test_position_ids_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make, dtype, bound, side):
    model = make().to(dtype)
    ids, mask = pad(ROWS, pad_id=0, side=side)
    with torch.no_grad():
        together = vocabulary_logits(model, hidden_states(model.base_model, ids, mask))
        for i, row in enumerate(ROWS):
            alone = model(torch.tensor([row])).logits[0]
            difference = (together[i][mask[i].bool()] - alone).abs().max().item()
            assert difference <= bound


def test_the_activation_is_one_operation_and_the_same_function(tmp_path):
    gpt2().double().save_pretrained(tmp_path)
    assert gpt2().config.activation_function == "gelu_new"
    ids = torch.arange(20)[None]
    expected = gpt2().double()(ids).logits
    ours = load_causal_lm(tmp_path).double()
    assert ours.config.activation_function == "gelu_pytorch_tanh"
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-6, rtol=0)
    trunk = RewardModel.from_pretrained(tmp_path).trunk
    assert trunk.config.activation_function == "gelu_pytorch_tanh"


def test_a_vocabulary_projection_with_a_bias_is_refused():
    lm = gpt2()
    lm.lm_head = torch.nn.Linear(16, 20, bias=True)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has a bias; take a model"):
        vocabulary_weight(lm)


def test_reward_head_initialisation():
    torch.manual_seed(0)
    head = RewardHead(10_000)
    assert head.bias.item() == 0
    # the standard error of the spread of 10,000 draws is 0.7 %
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(10_001), rel=0.03)
    assert abs(head.weight.mean().item()) < 4 / 10_000


def test_value_head_starts_at_zero():
    assert ValueHead(8)(torch.randn(3, 4, 8)).eq(0).all()
    assert ValueHead(8)(torch.randn(3, 4, 8)).shape == (3, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_reward_is_read_at_the_last_real_token(side):
    model = freeze(RewardModel(gpt2().base_model).double())
    scores = model(*pad(ROWS, pad_id=0, side=side))
    for score, row in zip(scores, ROWS, strict=True):
        hidden = model.trunk(torch.tensor([row])).last_hidden_state[0, -1]
        expected = (model.head.weight[0] * hidden).sum() + model.head.bias[0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_reward_model_has_no_vocabulary_projection():
    model = RewardModel(gpt2().base_model)
    assert not any(
        m.out_features == 20 for m in model.modules() if hasattr(m, "out_features")
    )


def test_heads_and_logits_are_float32_under_autocast():
    lm = gpt2()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = hidden_states(lm.base_model, *pad(ROWS, 0))
        assert vocabulary_logits(lm, hidden.bfloat16()).dtype == torch.float32
        assert RewardHead(16)(hidden.bfloat16()).dtype == torch.float32


def test_freeze_stops_dropout_and_gradients():
    model = freeze(gpt2().train())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_reward_model_survives_saving(tmp_path):
    model = freeze(RewardModel(gpt2().base_model))
    model.save_pretrained(tmp_path)
    reloaded = freeze(RewardModel.from_pretrained(tmp_path))
    batch = pad(ROWS, pad_id=0, side="left")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, reloaded.get_parameter(name))
    # The same weights elsewhere in memory may be added up in another order
    torch.testing.assert_close(model(*batch), reloaded(*batch), atol=1e-6, rtol=0)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_reward_model_takes_the_trunk_of_a_language_model(tmp_path):
    lm = gpt2()
    lm.save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path)
    for name, weight in lm.base_model.named_parameters():
        assert torch.equal(weight, model.trunk.get_parameter(name))
