import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import refused
from utils import models
from utils.data import load_tokenizer, pad
from utils.models import RewardModel, freeze, load_causal_lm
from utils.runs import prepare

ROWS = [[5, 6, 7, 8, 9], [3], [4, 2], [1, 2, 3, 4]]


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    config = GPT2Config(**{"vocab_size": 20, **sizes, **changes})
    return GPT2LMHeadModel(config).eval()


def test_a_fresh_critic_expects_nothing():
    values = models.PolicyWithValueHead(gpt2()).value_head(torch.randn(3, 4, 16))
    assert values.shape == (3, 4) and values.eq(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_reward_is_read_at_the_last_real_token(side):
    model = freeze(RewardModel(gpt2().base_model).double())
    scores = model(*pad(ROWS, pad_id=0, side=side))
    for score, row in zip(scores, ROWS, strict=True):
        hidden = model.trunk(torch.tensor([row])).last_hidden_state[0, -1]
        expected = (model.head.weight[0] * hidden).sum() + model.head.bias[0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-9)


def test_heads_and_logits_are_float32_under_autocast():
    lm = gpt2()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = models.hidden_states(lm.base_model, *pad(ROWS, 0)).bfloat16()
        assert models.vocabulary_logits(lm, hidden).dtype == torch.float32
        assert models.RewardHead(16)(hidden).dtype == torch.float32


def test_a_reward_model_has_no_vocabulary_and_survives_saving(tmp_path):
    lm = gpt2()
    lm.save_pretrained(tmp_path / "lm")
    model = RewardModel.from_pretrained(tmp_path / "lm")
    for name, weight in lm.base_model.named_parameters():
        assert torch.equal(weight, model.trunk.get_parameter(name))
    assert lm.config.activation_function == "gelu_new"  # which takes eight steps
    assert model.trunk.config.activation_function == "gelu_pytorch_tanh"
    outputs = [m.out_features for m in model.modules() if hasattr(m, "out_features")]
    assert outputs == [1]
    model.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm").state_dict()
    torch.testing.assert_close(again, model.state_dict(), atol=0, rtol=0)
    assert {f.suffix for f in (tmp_path / "rm").iterdir()} == {".json", ".safetensors"}


def torn(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(weights):
    """Weights come as safetensors only: unpickling runs whatever is in the file."""
    torch.save(gpt2().state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()


WEIGHTS, HEAD = "model.safetensors", RewardModel.HEAD_FILE
LOADERS = {"lm": load_causal_lm, "rm": RewardModel.from_pretrained}
LOADERS["words"] = load_tokenizer
SICK = {  # a file, what is done to it, what cannot be loaded any more, and the cause
    "no model": ("config.json", lambda file: file.unlink(), "lm rm", "config.json"),
    "torn weights": (WEIGHTS, torn, "lm rm", "SafetensorError: "),
    "pickled weights": (WEIGHTS, pickled, "lm rm", WEIGHTS),
    "a torn reward head": (HEAD, torn, "rm", "SafetensorError: "),
    "a torn tokenizer": ("tokenizer.json", torn, "words", "JSONDecodeError: Expecting"),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", SICK)
def test_a_damaged_or_foreign_folder_is_one_sentence(tmp_path, world, fault):
    file, spoil, whats, cause = SICK[fault]
    folder = tmp_path / "[a] 401 token 503"  # which are not the cause
    load_tokenizer(world / "model").save_pretrained(folder)
    RewardModel(gpt2().base_model).save_pretrained(folder)
    for load in LOADERS.values():
        load(folder)
    spoil(folder / file)
    for what in whats.split():
        says = f"{re.escape(str(folder))}.*{cause}.*; make it anew, or name another$"
        refused(says, LOADERS[what], folder)


SMALL = [  # a model, the settings, and what is said of it; nothing: it fits
    ({"n_positions": 70}, {}, None),
    ({"n_positions": 65}, {}, "65.*66.*max_tokens"),
    ({"n_positions": 70}, {"max_new_tokens": 64}, "70.*71.*max_new_tokens"),
    ({"vocab_size": 500, "n_positions": 70}, {}, "500.*927"),
]


@pytest.mark.faults
@pytest.mark.parametrize("sizes, changes, says", SMALL)
def test_a_model_too_small_for_the_texts(tmp_path, world, sizes, changes, says):
    gpt2(**{"vocab_size": 1200, **sizes}).save_pretrained(tmp_path / "lm")
    load_tokenizer(world / "model").save_pretrained(tmp_path / "lm")
    names = {"model_name": str(tmp_path / "lm"), "runs_dir": str(tmp_path)}
    made = "sft", "tiny", {"dataset_name": str(world / "dataset"), **names, **changes}
    if says is None:
        prepare(*made)
    else:
        refused(says, prepare, *made)
