import re

import pytest
import torch

from tests.conftest import refused
from tests.small import small_lm
from utils import models
from utils.data import load_tokenizer, pad
from utils.models import RewardModel, freeze, load_causal_lm
from utils.runs import prepare

ROWS = [[5, 6, 7, 8, 9], [3], [4, 2], [1, 2, 3, 4]]


def test_a_fresh_critic_expects_nothing():
    values = models.PolicyWithValueHead(small_lm()).value_head(torch.randn(3, 4, 16))
    assert values.shape == (3, 4) and values.eq(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_reward_is_read_at_the_last_real_token(side):
    model = freeze(RewardModel(small_lm().base_model).double())
    scores = model(*pad(ROWS, pad_id=0, side=side))
    for score, row in zip(scores, ROWS, strict=True):
        hidden = model.trunk(torch.tensor([row])).last_hidden_state[0, -1]
        expected = (model.head.weight[0] * hidden).sum() + model.head.bias[0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-9)


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = models.vocabulary_logits(small_lm().float(), torch.randn(2, 16))
    assert logits.dtype == torch.float32


def test_a_reward_model_has_no_vocabulary_and_survives_saving(tmp_path):
    lm = small_lm().float()
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
    torch.save(small_lm().state_dict(), weights.with_name("pytorch_model.bin"))
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
    RewardModel(small_lm().base_model).save_pretrained(folder)
    for load in LOADERS.values():
        load(folder)
    spoil(folder / file)
    for what in whats.split():
        says = f"{re.escape(str(folder))}.*{cause}.*; make it anew, or name another$"
        refused(says, LOADERS[what], folder)


SMALL = [  # words, positions and response; what is said; nothing: it fits
    (1200, 70, 32, None),
    (1200, 65, 32, "65.*66.*max_tokens"),
    (1200, 70, 64, "70.*71.*max_new_tokens"),
    (500, 70, 32, "500.*927"),
]


@pytest.mark.faults
@pytest.mark.parametrize("sizes", SMALL)
def test_a_model_too_small_for_the_texts(tmp_path, world, sizes):
    words, positions, response, says = sizes
    small_lm(words, n_positions=positions).save_pretrained(tmp_path / "lm")
    load_tokenizer(world / "model").save_pretrained(tmp_path / "lm")
    changes = {"model_name": str(tmp_path / "lm"), "runs_dir": str(tmp_path)}
    changes |= {"dataset_name": str(world / "dataset"), "max_new_tokens": response}
    if says is None:
        prepare("sft", "tiny", changes)
    else:
        refused(says, prepare, "sft", "tiny", changes)
