"""The real loading code, `gpt2` and `stanfordnlp/sst2`, against a hub on loopback."""

import contextlib
import json
import os
import re
import socket
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


def load(code=LOAD, **environ):
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "RLHF_"))
    }
    environ = {**ours, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environ}
    return subprocess.run(
        [sys.executable, "-c", code],
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


FAULTY = """
from utils.models import load_causal_lm
try:
    load_causal_lm("gpt2")
    print("loaded")
except Exception as error:
    print(type(error).__name__, str(error))
"""


def nobody():
    """An address where nobody listens, as without a network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return contextlib.nullcontext(f"http://127.0.0.1:{port}")


HELP = r"name a local folder, or take the preset 'tiny', which downloads nothing$"


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault, says",
    [
        (
            "missing",
            "^FileNotFoundError the Hugging Face Hub has no public model 'gpt2'",
        ),
        ("always 503", f"^ConnectionError the model 'gpt2' could not be had .*{HELP}"),
        ("503 at first", "^loaded$"),
        ("no network", f"^ConnectionError the model 'gpt2' could not be had .*{HELP}"),
    ],
)
def test_a_hub_that_fails(world, tmp_path, report, fault, says):
    gpt2 = {"gpt2": world / "model"}
    hubs = {
        "missing": lambda: hub.serve({}, {}),
        "always 503": lambda: hub.serve(gpt2, {}, fault=lambda n: 503),
        "503 at first": lambda: hub.serve(gpt2, {}, lambda n: 503 if n < 2 else None),
        "no network": nobody,
    }
    waits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    with hubs[fault]() as address:
        done = load(FAULTY, HF_ENDPOINT=address, HF_HOME=str(tmp_path), **waits)
    said = done.stdout.strip().splitlines()[-1]
    assert re.search(says, said), said
    report("faults tried", f"hub, {fault}: {said[:150]}")


@pytest.mark.faults
def test_a_damaged_cache_is_named(world, tmp_path, report):
    with hub.serve({"gpt2": world / "model"}, {}) as address:
        environ = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        assert load(FAULTY, **environ).stdout.strip() == "loaded"
        (weights,) = tmp_path.rglob("model.safetensors")
        whole = weights.resolve().read_bytes()
        # A download that was cut off is begun again
        weights.resolve().with_suffix(".incomplete").write_bytes(whole[:100])
        assert load(FAULTY, **environ).stdout.strip() == "loaded"
        # A file that was cut off behind the library's back
        weights.resolve().write_bytes(whole[: len(whole) // 2])
        said = load(FAULTY, **environ).stdout.strip()
    assert re.search(
        "^ValueError .* was downloaded, but cannot be loaded .* delete", said
    )
    report("faults tried", f"hub, a damaged cache: {said[:150]}")
