"""Models and data sets that cannot do: one sentence each, before training."""

import dataclasses
import json
import socket

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
)

from utils import inputs
from utils.data import load_reviews, load_tokenizer, tokenize
from utils.models import RewardModel, load_causal_lm
from utils.settings import TINY
from utils.support import preflight

pytestmark = pytest.mark.faults


def reviews_of(name):
    return load_reviews(dataclasses.replace(TINY, dataset_name=name))


def test_a_very_long_sentence_is_cut(world):
    tokenizer = load_tokenizer(str(world / "model"))
    (row,) = tokenize(["fine " * 50_000], tokenizer, TINY.max_tokens)
    assert len(row) == TINY.max_tokens and row[-1] == tokenizer.eos_token_id


def test_a_sentence_that_holds_eos(world, survived):
    """It would end a text, or a prompt, in the middle; or be all that there is."""
    tokenizer = load_tokenizer(str(world / "model"))
    for sentence in ("<|endoftext|>", "never dull <|endoftext|> a film"):
        with pytest.raises(
            ValueError, match="holds the EOS token '<.endoftext.>'"
        ) as e:
            tokenize(["a film", sentence], tokenizer, TINY.max_tokens)
        survived("a sentence that holds EOS", str(e.value))


@pytest.mark.parametrize(
    "name, what",
    [("./nowhere", reviews_of), ("/no/where", load_causal_lm),
     ("runs/no/model", load_tokenizer), ("runs/no/model", RewardModel.from_pretrained)],
)  # fmt: skip
def test_a_folder_that_does_not_exist(survived, name, what):
    says = f"there is no folder '{name}'"
    with pytest.raises(FileNotFoundError, match=says) as caught:
        what(name)
    survived("a folder that does not exist", str(caught.value))


def test_a_local_folder_needs_no_network(world, monkeypatch):
    asked = []

    def look_up(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.chdir(world)
    load_tokenizer("model")  # which might be a name on the hub too
    load_causal_lm("model")
    reviews_of("dataset")
    assert not asked


def test_a_hub_out_of_reach_is_not_asked_again(monkeypatch):
    class ConnectError(Exception):
        pass

    def find_no_way(*_, **__):
        raise ConnectError("no way there")

    monkeypatch.setattr(inputs, "repo_info", find_no_way)
    with (
        pytest.raises(ConnectionError, match=r"\(ConnectError: no way there\); try"),
        inputs.loading("model", "gpt2"),
    ):
        assert huggingface_hub.is_offline_mode()
        raise OSError("not in the cache")
    assert not huggingface_hub.is_offline_mode()


def test_a_folder_without_a_model(tmp_path):
    for load in (load_causal_lm, load_tokenizer, RewardModel.from_pretrained):
        with pytest.raises(ValueError, match="the folder .* holds no .* can be loaded"):
            load(str(tmp_path))


def model_folder(folder, world, model):
    model.save_pretrained(folder)
    load_tokenizer(str(world / "model")).save_pretrained(folder)
    return str(folder)


def gpt2(**changes):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 128}
    config = {"vocab_size": 1200, "eos_token_id": 0, "bos_token_id": 0, **sizes}
    return GPT2LMHeadModel(GPT2Config(**{**config, **changes}))


def test_a_model_that_looks_ahead(tmp_path, world, survived):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=1200, intermediate_size=16, **sizes))
    name = model_folder(tmp_path, world, bert)
    says = "BertLMHeadModel is no causal language model"
    with pytest.raises(ValueError, match=says) as caught:
        load_causal_lm(name)
    survived("a model that is not causal", str(caught.value))


def test_a_tokenizer_without_an_end(tmp_path, world, survived):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    says = "has no EOS token, so no text could end"
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(str(tmp_path))
    survived("a tokenizer without EOS", str(caught.value))


def test_a_tokenizer_without_words(tmp_path):
    gpt2().config.save_pretrained(tmp_path)  # of which the library makes a tokenizer
    with pytest.raises(ValueError, match="has no words, only .*; let the hub be"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "places, says",
    [
        (60, "max_tokens is 66, but .* reads 60 tokens at most; lower max_tokens"),
        (70, None),
    ],
)
def test_a_context_shorter_than_a_text(tmp_path, world, survived, places, says):
    name = model_folder(tmp_path, world, gpt2(n_positions=places))
    changes = {"model_name": name, "dataset_name": str(world / "dataset")}
    if says is None:
        preflight.prepare("sft", "tiny", changes)
        changes["max_new_tokens"] = 64
        says = r"prompt_max_tokens \+ max_new_tokens is 71"
    with pytest.raises(ValueError, match=says) as caught:
        preflight.prepare("sft", "tiny", changes)
    survived("a context shorter than a text", str(caught.value))


def test_the_first_cell_stands_above_the_environment(world, monkeypatch, capsys):
    """And the environment above the preset; what differs from that is printed."""
    monkeypatch.setenv("RLHF_PRESET", "tiny")
    monkeypatch.setenv("RLHF_KL_COEF", "0.3")
    monkeypatch.setenv("RLHF_SFT_EPOCHS", "2")
    names = {"model_name": str(world / "model"), "dataset_name": str(world / "dataset")}
    settings, device = preflight.prepare("policy", "", {"kl_coef": 0.25, **names})
    ours = {"kl_coef": 0.25, "sft_epochs": 2, **names}
    assert settings == dataclasses.replace(TINY, **ours)
    assert str(device) in ("cpu", "cuda")
    said = capsys.readouterr().out
    assert "sft_epochs 2 instead of 1" in said
    assert "kl_coef 0.25 instead of 0.1" in said
    with pytest.raises(ValueError, match="^there is no setting 'kl'; the nearest is"):
        preflight.prepare("policy", "", {"kl": 0.25})
    with pytest.raises(ValueError, match="^kl_coef must be 0 or more, got -1.0"):
        preflight.prepare("policy", "", {"kl_coef": -1})


def test_what_stands_in_front_of_a_prompt_is_read_too():
    fits = LlamaConfig(max_position_embeddings=66)
    short = dataclasses.replace(TINY, max_new_tokens=59)  # and prompts of 7
    inputs.check_context(fits, short)
    with pytest.raises(ValueError, match=r"max_new_tokens is 67, but .* lower max_new"):
        inputs.check_context(fits, short, front=1)


def test_a_model_without_a_limit_passes():
    inputs.check_context(LlamaConfig(max_position_embeddings=66), TINY)
    config, endless = MambaConfig(), dataclasses.replace(TINY, max_tokens=10_000)
    inputs.check_context(config, endless)


def test_a_tokenizer_with_more_words_than_the_model(tmp_path, world, survived):
    name = model_folder(tmp_path, world, gpt2(vocab_size=500))
    changes = {"model_name": name, "dataset_name": str(world / "dataset")}
    says = "has 927 tokens and the model only 500"
    with pytest.raises(ValueError, match=says) as caught:
        preflight.prepare("sft", "tiny", changes)
    survived("a tokenizer with more words than the model", str(caught.value))


def test_two_tokenizers(tmp_path, world, survived):
    tokenizer = load_tokenizer(str(world / "model"))
    inputs.check_same_tokenizer(tokenizer, load_tokenizer(str(world / "model")))
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    a, b = list(words)[500:502]
    words[a], words[b] = words[b], words[a]  # as many words, but numbered otherwise
    file.write_text(json.dumps(content))
    says = "sft has a tokenizer of 927 .* reward_model"
    with pytest.raises(ValueError, match=says) as caught:
        inputs.check_same_tokenizer(tokenizer, load_tokenizer(str(tmp_path)))
    survived("another tokenizer than the reward model's", str(caught.value))


def test_pickled_weights_are_refused(tmp_path, world, survived):
    """Weights come as safetensors only: unpickling runs whatever is in the file."""
    model = gpt2()
    name = model_folder(tmp_path, world, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    says = "holds no language model that can be loaded"
    with pytest.raises(ValueError, match=says) as caught:
        load_causal_lm(name)
    survived("pickled weights", str(caught.value))
