"""Giving a model away: the card, the folder, and a hub on loopback that takes it."""

import copy
import dataclasses
import json
import re
from base64 import b64decode

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from more.share import check_name, make_folder, model_card, public_name, push
from tests import hub
from tests.conftest import refused
from utils.data import load_tokenizer
from utils.evaluation import FIGURES
from utils.models import RewardModel, load_causal_lm
from utils.runs import save_artefact
from utils.settings import FULL, STAGES, TINY

# Numbers that nobody would write by hand, for every figure
NUMBERS = 3 * torch.rand(2, len(FIGURES), generator=torch.Generator().manual_seed(1))
BEFORE, AFTER = (dict(zip(FIGURES, row.tolist(), strict=True)) for row in NUMBERS)
del BEFORE["share"]
METRICS = {  # a figure may stand in any stage
    "sft": {"before": BEFORE, "after": {}},
    "reward_model": {"before": {}, "after": {}, "validation_rows": 321},
    "policy": {"before": {}, "after": AFTER},
}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """What is given away of the tiny world's model, untrained, with these figures."""
    settings = dataclasses.replace(TINY, runs_dir=str(tmp_path_factory.mktemp("runs")))
    tokenizer, lm = load_tokenizer(world / "model"), load_causal_lm(world / "model")
    models = [lm, RewardModel(copy.deepcopy(lm.base_model)), lm]
    for name, model in zip(STAGES, models, strict=True):
        save_artefact(settings, name, model, tokenizer, METRICS[name])
    return make_folder(settings, "me/praise", "mit", "these")


def test_the_folder_is_plain_and_the_card_has_the_numbers_of_the_files(folder, world):
    lms = [AutoModelForCausalLM.from_pretrained(x) for x in (folder, world / "model")]
    torch.testing.assert_close(*(lm(torch.tensor([[5, 6]])).logits for lm in lms))
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "settings.json").exists()  # it may name folders here
    card = ModelCard.load(folder / "README.md")
    rows = re.findall(r"^\| (.+?) \| (.*?) \| (.*?) \|$", card.text, re.M)
    assert sorted(rows) == sorted(
        (said, format(BEFORE[x], spec) if x in BEFORE else "", format(AFTER[x], spec))
        for x, (said, spec) in FIGURES.items()
    )
    # Those in the text, too
    (fell,) = re.findall(r"went from\s+([\d.]+) to ([\d.]+) with", card.text)
    assert fell == tuple(f"{x['distinct_2']:.3f}" for x in (BEFORE, AFTER))
    assert "(321 rows)" in card.text and "of 436,992 parameters" in card.text
    assert json.loads((folder / "metrics.json").read_text()) == METRICS
    assert ", ppo_epochs 4, " in card.text  # of the settings, the numbers


def test_the_card_names_no_folder_here(folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "text-generation")
    assert card.data.tags[0] == "rlhf" and "\nmit, as its maker states" in card.text
    (secret := tmp_path / "reviews.csv").write_text("x")
    own = {"dataset_name": str(secret), "model_name": "~/models/mine"}
    hubs = (["stanfordnlp/sst2"], "gpt2")
    for changes, names, says in (
        ({"kl_coef": 0.5}, hubs, "Changed: kl_coef 0.5."),
        (own, (None, None), "a data set of its maker's own"),
        ({"runs_dir": str(tmp_path)}, hubs, "Changed: nothing."),
    ):
        settings = dataclasses.replace(FULL, **changes)
        card = model_card(settings, METRICS, 1000, "mit", "these", "me/praise")
        assert (card.data.datasets, card.data.base_model) == names and says in card.text
        assert str(tmp_path) not in str(card) and "~/models" not in str(card)
    for name in ("/data/gpt2", "a/b/c", "C:\\models", "utils"):  # the last a folder
        assert public_name(name) is None
    refused("OWNER/MODEL", check_name, "praise")


@pytest.fixture
def push_to(network, folder, monkeypatch):
    """`push_to(address)` sends the folder to the hub at this address."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary")

    def push_there(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        return push(folder, "me/praise")

    return push_there


def test_a_push_sends_the_folder_to_a_private_repository(push_to, folder):
    with hub.serve({}, {}, sent=(sent := [])) as address:
        assert push_to(address) == f"{address}/me/praise"
    assert {bearer for bearer, *_ in sent} == {"Bearer hf_canary"}
    (_, _, (made,)), *_, (_, path, (_, *files)) = sent
    assert (made["organization"], made["name"]) == ("me", "praise")
    assert made.get("private") or made.get("visibility") == "private"
    assert path.startswith("/api/models/me/praise/commit/")
    found = {x["value"]["path"]: b64decode(x["value"]["content"]) for x in files}
    assert found == {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.faults
def test_a_push_that_is_refused_is_one_sentence(push_to):
    full = 422, "It takes no more"  # the repository is made, and takes nothing
    taking_none = hub.serve({}, {}, lambda n: n and full, sent=[])
    for why, there in ((full[1], taking_none), ("Connection refused", hub.nobody())):
        says = rf"^cannot send me/praise .*{why}.*; take a name that is free"
        with there as address:
            assert "canary" not in refused(says, push_to, address)
