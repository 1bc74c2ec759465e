"""Giving a model away: the card, the folder, and a hub on loopback that takes it."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, pipeline

from tests import hub
from tests.conftest import ROOT
from utils.data import load_tokenizer
from utils.evaluation import FIGURES
from utils.lora import add_adapter, save_adapter
from utils.models import RewardModel, load_causal_lm
from utils.settings import FULL, TINY
from utils.support.artefacts import save_artefact
from utils.support.run import EARLIER_FIGURES
from utils.support.share import (
    check_name,
    make_folder,
    model_card,
    public_name,
    whole_policy,
)

NAMED = {**EARLIER_FIGURES, **FIGURES}
TOKEN = "hf_" + "Thisisnotatokenbutacanaryof34chars"


def figures(seed):
    """Numbers that nobody would write by hand, for every figure."""
    numbers = torch.Generator().manual_seed(seed)
    return {name: torch.rand((), generator=numbers).item() * 3 for name in NAMED}


def metrics():
    before, after = figures(1), figures(2)
    before.pop("share")

    def of(names, **more):
        parts = {"before": before, "after": after}
        for when, part in parts.items():
            parts[when] = {name: x for name, x in part.items() if name in names}
        return {**parts, **more}

    return {
        "sft": of({"validation_loss", "validation_perplexity"}),
        "reward_model": of({"accuracy"}, validation_rows=321, baseline=0.5),
        "policy": of(FIGURES, seconds=1.0, history=[]),
    }


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A run whose three models are the tiny world's, untrained, with these figures."""
    settings = dataclasses.replace(TINY, runs_dir=str(tmp_path_factory.mktemp("runs")))
    tokenizer, lm = load_tokenizer(world / "model"), load_causal_lm(world / "model")
    models = {"sft": lm, "reward_model": RewardModel(copy.deepcopy(lm.base_model))}
    for name, found in metrics().items():
        save_artefact(settings, name, models.get(name, lm), tokenizer, found)
    return settings


@pytest.fixture(scope="module")
def folder(runs):
    return make_folder(runs, "me/praise", "mit", "these notebooks")


def test_every_figure_of_the_card_is_that_of_the_metrics(folder):
    found, card = metrics(), ModelCard.load(folder / "README.md")
    after = {k: v for stage in found.values() for k, v in stage["after"].items()}
    before = {k: v for stage in found.values() for k, v in stage["before"].items()}
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == after
    rows = re.findall(r"^\| (.+?) \| (.*?) \| (.*?) \|$", card.text, re.M)
    shown = {
        NAMED[key][0]: (
            format(before[key], NAMED[key][1]) if key in before else "",
            format(after[key], NAMED[key][1]),
        )
        for key in after
    }
    assert {name: (old, new) for name, old, new in rows} == shown
    assert len(rows) == len(NAMED) == 16
    # Those in the text, too
    (fell,) = re.findall(r"went from\s+([\d.]+) to ([\d.]+) with", card.text)
    assert fell == (f"{before['distinct_2']:.3f}", f"{after['distinct_2']:.3f}")
    assert "(321 rows)" in card.text
    count = load_causal_lm(folder).num_parameters()
    assert f"of {count:,} parameters" in card.text
    assert json.loads((folder / "metrics.json").read_text()) == found


def test_every_number_of_the_settings_stands_in_the_card(folder):
    text = (folder / "README.md").read_text("utf8")
    for one in dataclasses.fields(TINY):
        if one.type is not str and set(one.metadata["changes"]) - {"figures"}:
            value = f"{getattr(TINY, one.name):g}"
            assert re.search(rf"\b{one.name} {re.escape(value)}[,.]\s?", text)


def test_the_card_is_valid_and_says_the_licence(folder, tmp_path, monkeypatch):
    """As `ModelCard.validate` asks the hub, here the one on loopback."""
    card = ModelCard.load(folder / "README.md")
    with hub.serve({}, {}) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        card.validate()
        broken = ModelCard(str(card).replace("license: mit", "license: [mit]"))
        with pytest.raises(ValueError, match="license"):
            broken.validate()
    head = yaml.safe_load(str(card).split("---")[1])
    assert (head["license"], head["pipeline_tag"]) == ("mit", "text-generation")
    assert "base_model" not in head and "datasets" not in head  # of no hub
    assert "\nmit, as its maker states" in card.text


def test_a_card_names_the_hubs_repositories_and_no_folder_of_this_machine(tmp_path):
    def of(settings):
        return model_card(settings, metrics(), 1000, "mit", "these", "me/praise")

    card = of(dataclasses.replace(FULL, kl_coef=0.5))
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["stanfordnlp/sst2"])
    assert f"Changed: kl_coef 0.5 instead of {FULL.kl_coef}." in card.text
    secret = tmp_path / "home" / "reviews.csv"
    secret.parent.mkdir()
    secret.write_text("x")
    named = {"dataset_name": str(secret), "model_name": "~/models/mine"}
    card = of(dataclasses.replace(FULL, runs_dir=str(tmp_path), **named))
    assert str(tmp_path) not in str(card) and "~/models" not in str(card)
    assert "a data set of its maker's own" in card.text
    assert card.data.base_model is None and card.data.datasets is None
    assert "Changed: nothing." in card.text


@pytest.mark.parametrize(
    "name, public",
    [
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("/data/gpt2", None),
        ("a/b/c", None),
        ("utils", None),  # a folder here
        ("C:\\models", None),
    ],
)
def test_what_is_a_name_on_the_hub(name, public):
    assert public_name(name) == public


def test_a_stage_that_is_missing_is_named():
    some = {k: v for k, v in metrics().items() if k != "sft"}
    with pytest.raises(ValueError, match="there are no metrics of sft; run the note"):
        model_card(TINY, some, 1, "mit", "these", "me/praise")


def test_the_folder_loads_with_plain_transformers(folder, world):
    lm = AutoModelForCausalLM.from_pretrained(folder)
    expected = load_causal_lm(world / "model")
    ids = torch.tensor([load_tokenizer(folder)("the film is")["input_ids"]])
    torch.testing.assert_close(lm(ids).logits, expected(ids).logits)
    write = pipeline("text-generation", model=str(folder))
    (said,) = write("the film is", do_sample=True, top_k=0, max_new_tokens=5)
    assert said["generated_text"].startswith("the film is ")
    names = {file.name for file in folder.iterdir()}
    assert "settings.json" not in names  # it may name folders of this machine
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= names


def test_an_adapter_is_merged_into_its_base(world, tmp_path):
    base = load_causal_lm(world / "model")
    adapted = add_adapter(copy.deepcopy(base), "policy", rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "adapters" in name:
                weight.copy_(0.1 * torch.randn_like(weight))
    save_adapter(adapted, "policy", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(world / "model")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merged = whole_policy(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = adapted(ids).logits
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert (logits - base(ids).logits).abs().max() > 0.1
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("name", ["praise", "a/b/c", "me/", "/praise", "me/a b", "-/x"])
def test_a_name_of_another_form_is_named(name):
    with pytest.raises(ValueError, match=re.escape("OWNER/MODEL, in letters, digits")):
        check_name(name)


PUSH = """
import json, os, sys
from huggingface_hub import constants
from utils.support.notebook import no_widgets
from utils.support.share import push

no_widgets()
said = []
for address, token, name in json.loads(sys.argv[2]):
    constants.ENDPOINT, os.environ["HF_TOKEN"] = address, token
    try:
        said.append(push(sys.argv[1], name))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


def python(code, *arguments, **environ):
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RLHF_"))}
    ours |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    # The newer protocol (Xet) needs a server of its own; the hub still takes LFS
    ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**ours, **environ},
        capture_output=True,
        text=True,
        timeout=90,
    )


LOAD = """
import sys
from transformers import pipeline
write = pipeline("text-generation", model=sys.argv[1])
print(write("the film is", do_sample=False, max_new_tokens=4)[0]["generated_text"])
"""


@pytest.mark.faults
@pytest.mark.slow
def test_what_was_pushed_loads_and_what_goes_wrong_is_a_sentence(
    folder, tmp_path, survived
):
    accounts, store, home = {TOKEN: "me"}, tmp_path / "hub", tmp_path / "home"
    with hub.serve({}, {}) as nobody:
        pass  # gone again: nobody listens there
    with (
        hub.serve({}, {}, accounts=accounts, store=store) as address,
        # It makes a repository, and refuses what should go into it
        hub.serve({}, {}, lambda n: 422, accounts, tmp_path / "other") as broken,
    ):
        tries = {
            "made": (address, TOKEN, "me/praise"),
            "taken": (address, TOKEN, "me/praise"),
            "foreign": (address, TOKEN, "you/x"),
            "unknown": (address, "hf_unknown", "me/other"),
            "without": (address, "", "me/other"),
            "nobody": (nobody, TOKEN, "me/third"),
            "broken": (broken, TOKEN, "me/fourth"),
        }
        tried = json.dumps(list(tries.values()))
        done = python(PUSH, folder, tried, HF_HOME=str(home))
        assert done.returncode == 0, done.stderr[-3000:]
        outputs = [done.stdout + done.stderr]
        said = json.loads(done.stdout.splitlines()[-1])
        said = dict(zip(tries, said, strict=True))
        assert said.pop("made") == f"{address}/me/praise"
        for file in folder.iterdir():
            there = store / "me" / "praise" / file.name
            assert there.read_bytes() == file.read_bytes()
        # Private: with the token it loads by its name, without it is not there
        for token in (TOKEN, ""):
            environ = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / f"t{token}")}
            loaded = python(LOAD, "me/praise", HF_TOKEN=token, **environ)
            outputs.append(loaded.stdout + loaded.stderr)
            assert (loaded.returncode == 0) == bool(token), loaded.stderr[-3000:]
            assert loaded.stdout.startswith("the film is ") == bool(token)
    begins = {
        "taken": "FileExistsError: the name me/praise is taken on the Hugging Face Hub",
        "foreign": "PermissionError: this token may not write to you/x; take a name",
        "unknown": "PermissionError: the Hugging Face Hub does not know this token; m",
        "without": "PermissionError: there is no token of the Hugging Face Hub; make",
        "nobody": "ConnectionError: me/third could not be sent to the Hugging Face Hub "
        "(no connection); try again later",
        "broken": "ConnectionError: me/fourth could not be sent to the Hugging Face "
        "Hub (it says 422); try again later; delete me/fourth there, and try again",
    }
    for name, sentence in said.items():
        assert sentence.startswith(begins[name]) and "\n" not in sentence
        survived(f"hub: a push, {name}", sentence)
    assert "delete" not in said["nobody"]  # there is nothing to delete
    assert not [text for text in outputs if TOKEN in text]
