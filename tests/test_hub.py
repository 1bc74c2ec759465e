"""The real loading code, `gpt2` and `stanfordnlp/sst2`, against a hub on loopback."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests import hub
from tests.conftest import ROOT
from utils.data import load_reviews
from utils.models import load_causal_lm

LOAD = """
import json, sys
import torch
from utils.data import load_reviews, load_tokenizer
from utils.models import RewardModel, load_causal_lm
from utils.settings import FULL

tokenizer = load_tokenizer(FULL.model_name)
model = load_causal_lm(FULL.model_name).eval()
RewardModel.from_pretrained(FULL.model_name)
reviews = load_reviews(FULL.dataset_name)
ids = tokenizer("the plot is dull")["input_ids"]
print(json.dumps({
    "ids": ids,
    "logits": model(torch.tensor([ids])).logits[0, -1, :5].tolist(),
    "rows": {name: len(split) for name, split in reviews.items()},
    "first": reviews["train"]["sentence"][0],
}))
"""


def load(**environ):
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "RLHF_"))
    }
    environ = {**ours, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environ}
    return subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def loaded(world, tmp_path_factory):
    folders = {"gpt2": world / "model"}, {"stanfordnlp/sst2": world / "dataset"}
    with hub.serve(*folders) as address:
        done = load(HF_ENDPOINT=address, HF_HOME=str(tmp_path_factory.mktemp("home")))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_model_and_tokenizer_come_from_the_hub(loaded, world):
    model = load_causal_lm(world / "model").eval()
    logits = model(torch.tensor([loaded["ids"]])).logits[0, -1, :5]
    torch.testing.assert_close(torch.tensor(loaded["logits"]), logits)


def test_the_data_set_comes_from_the_hub(loaded, world):
    reviews = load_reviews(str(world / "dataset"))
    assert loaded["rows"] == {name: len(split) for name, split in reviews.items()}
    assert loaded["first"] == reviews["train"]["sentence"][0]
