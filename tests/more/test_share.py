"""Giving a model away: the card, the folder, and a hub on loopback that takes it."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from more.share import check_name, make_folder, model_card, public_name
from tests import hub
from tests.conftest import ROOT
from utils.data import load_tokenizer
from utils.evaluation import FIGURES
from utils.models import RewardModel, load_causal_lm
from utils.runs import STAGES, save_artefact
from utils.settings import FULL, TINY

# Numbers that nobody would write by hand, for every figure
NUMBERS = 3 * torch.rand(2, len(FIGURES), generator=torch.Generator().manual_seed(1))
BEFORE, AFTER = (dict(zip(FIGURES, row.tolist(), strict=True)) for row in NUMBERS)
del BEFORE["share"]
METRICS = {stage: {"before": {}, "after": {}} for stage in STAGES}
for when, figures in (("before", BEFORE), ("after", AFTER)):
    for name, x in figures.items():
        early = {"accuracy": "reward_model"}.get(name, "policy")
        METRICS["sft" if "validation" in name else early][when][name] = x
METRICS["reward_model"]["validation_rows"] = 321


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
    numbers = re.findall(r"^\* Numbers: (.+)\.$", card.text, re.M)[0].split(", ")
    found = {name: float(x) for name, x in (one.split(" ") for one in numbers)}
    kinds = dataclasses.asdict(TINY).items()  # of the settings, no text
    assert found == {k: pytest.approx(x) for k, x in kinds if type(x) in (int, float)}


def test_the_card_is_valid_and_names_no_folder_here(folder, tmp_path, monkeypatch):
    """As `ModelCard.validate` asks the hub, here the one on loopback."""
    card = ModelCard.load(folder / "README.md")
    with hub.serve({}, {}) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        card.validate()
        broken = ModelCard(str(card).replace("license: mit", "license: [mit]"))
        with pytest.raises(ValueError, match="license"):
            broken.validate()
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "text-generation")
    assert "\nmit, as its maker states" in card.text
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
    names = {"gpt2": 1, "openai-community/gpt2": 1, "/data/gpt2": 0, "a/b/c": 0}
    for name, public in (names | {"C:\\models": 0, "utils": 0}).items():  # a folder
        assert public_name(name) == (name if public else None)
    for name in ("praise", "a/b/c", "me/", "/praise", "me/a b", "-/x"):
        with pytest.raises(ValueError, match="OWNER/MODEL|[Rr]epo id"):
            check_name(name)


PUSH = """
import json, os, sys
from huggingface_hub import constants
from more.share import push
for constants.ENDPOINT, os.environ["HF_TOKEN"], name in json.loads(sys.argv[2]):
    try:
        print(push(sys.argv[1], name))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
TOKEN = "hf_" + "Thisisnotatokenbutacanaryof34chars"
TRIES = {  # the hub, the token, the name, and what is said
    "made": ("hub", TOKEN, "me/praise", "/me/praise"),
    "taken": ("hub", TOKEN, "me/praise", "already created"),
    "foreign": ("hub", TOKEN, "you/x", "You don't have the rights"),
    "unknown": ("hub", "hf_unknown", "me/other", "Invalid username or password"),
    "without": ("hub", "", "me/x", "set a token that may write as HF_TOKEN"),
    "nobody": ("nobody", TOKEN, "me/third", "refused); take a name that is free"),
    "broken": ("broken", TOKEN, "me/fourth", "refused"),
}


@pytest.mark.faults
@pytest.mark.slow
def test_a_push_arrives_or_ends_in_a_sentence(folder, tmp_path, survived):
    # The newer protocol (Xet) needs a server of its own; the hub still takes LFS
    ours = {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    ours |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    accounts, store = {TOKEN: "me"}, tmp_path / "hub"
    with hub.serve({}, {}) as nobody:
        pass  # gone again: nobody listens there
    with (
        hub.serve({}, {}, accounts=accounts, store=store) as address,
        # It makes a repository, and refuses what should go into it
        hub.serve({}, {}, lambda n: 422, accounts, tmp_path / "other") as broken,
    ):
        hubs = {"hub": address, "nobody": nobody, "broken": broken}
        tried = json.dumps([(hubs[at], *rest) for at, *rest, _ in TRIES.values()])
        command = [sys.executable, "-c", PUSH, str(folder), tried]
        done = subprocess.run(command, env={**os.environ, **ours}, **options)
        assert TOKEN not in done.stdout + done.stderr
        lines = zip(TRIES.items(), done.stdout.splitlines(), strict=True)
        for (what, (*_, name, says)), said in lines:
            failed = f"OSError: cannot send {name} to the Hugging Face Hub ("
            assert said.startswith("http" if what == "made" else failed), said
            assert says in said, said
            survived(f"hub: a push, {what}", said)
        sent = store / "me" / "praise"
        for file in folder.iterdir():
            assert (sent / file.name).read_bytes() == file.read_bytes()
        # Private: without the token it is not there
        for token, status in ((TOKEN, 200), ("another", 404)):
            place = f"{address}/me/praise/resolve/main/config.json"
            headers = {"Authorization": f"Bearer {token}"}
            assert httpx.get(place, headers=headers).status_code == status
