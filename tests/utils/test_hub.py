"""The real loading code, `gpt2` and `stanfordnlp/sst2`, against a hub on loopback."""

import json
import re
import threading

import datasets
import pytest
from huggingface_hub import HfApi, is_offline_mode

from tests import hub
from tests.conftest import ROOT, python, refused
from tests.hub import nobody, silent
from tests.utils.test_data import JSONL, written
from utils import data
from utils.models import load_causal_lm
from utils.settings import TINY

pytestmark = pytest.mark.faults


def refuses(status):
    return lambda: hub.serve({}, {}, lambda n: status)


# A hub, or the proxy before it; the words of the cause; those of the remedy
NOT_THERE, ONLINE = "RepoNotFound", "connect|later"
SICK = {"me/model": ROOT / "utils"}  # described, but it cannot be read
CAUSES = {
    "missing": (refuses((404, NOT_THERE)), "404", "correct the name$"),
    # The real hub says 401 to a stranger who asks for what is not there
    "not there": (refuses((401, NOT_THERE)), "401", "correct the name.*TOKEN"),
    "out of order": (refuses(503), "503 Service Unavailable", ONLINE),
    "asked too often": (refuses(429), "429 Too Many Requests", ONLINE),
    "silent": (silent, "timed out", ONLINE),
    "nobody there": (nobody, "Connection refused", ONLINE),
    "a proxy with a password": (refuses(407), "407 Proxy", "HTTPS_PROXY"),
    "damaged": (lambda: hub.serve(SICK, {}), "JSONDecodeError: Expecting", "delete"),
}


@pytest.mark.parametrize("fault", CAUSES)
def test_what_a_hub_does_is_one_sentence(network, monkeypatch, fault):
    """It quotes the innermost cause; and who cannot be reached is not asked again."""
    (place, cause, remedy), modes = CAUSES[fault], []

    def load():
        with data.loading("model", "me/model"):
            modes.append(is_offline_mode())
            json.loads("")

    with place() as address:
        if "proxy" in fault:
            monkeypatch.setenv("HTTP_PROXY", address)
            address = "http://hub.invalid"
        monkeypatch.setattr(data, "repo_info", HfApi(address).repo_info)
        refused(rf"^cannot .* 'me/model' \(.*{cause}.*\); .*({remedy})", load)
    assert modes[0] or not re.search("refused|timed", cause)
    assert not is_offline_mode()


LOAD = """
import dataclasses, json, sys
from huggingface_hub import is_offline_mode
from utils.data import load_reviews, load_tokenizer
from utils.models import RewardModel, load_causal_lm
from utils.settings import FULL

def load(what, name, config=""):
    if what == "tokenizer":
        return load_tokenizer(name)("the plot is dull")["input_ids"]
    if what == "data set":
        named = dataclasses.replace(FULL, dataset_name=name, dataset_config=config)
        return load_reviews(named)["train"]["sentence"][:2]
    model = load_causal_lm if what == "model" else RewardModel.from_pretrained
    parts = model(name).named_parameters()
    return sum(p.abs().sum().item() for n, p in parts if "head" not in n)

said = []
for case in json.loads(sys.argv[1]):
    try:
        said.append(load(*case))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps([*said, is_offline_mode()]))
"""


def loads(cases, **environ):
    """What becomes of each (what, name), in a process of their own; what is printed."""
    environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_TOKEN": ""}
    done = python("-c", LOAD, json.dumps(cases), HF_HUB_OFFLINE="0", **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    *printed, said = done.stdout.splitlines()
    return json.loads(said), "".join(printed)


CONFIG = "- {{config_name: {0}, data_files: {0}.jsonl}}\n"
BOTH = "OSError: .*'cola', 'sst2'.*dataset_config"
CACHED = [("model", "gpt2"), ("tokenizer", "gpt2"), ("trunk", "gpt2")]
CACHED += [("data set", "stanfordnlp/sst2"), ("model", "me/large")]
FORMS = {  # what, name and configuration; what is said
    ("data set", "nyu-mll/glue", ""): BOTH,
    ("data set", "nyu-mll/glue", "sst2"): r"\['sst2 0, .*",
    ("data set", "me/closed", ""): "OSError: .*gated.*accept its terms",
    ("model", "me/closed"): "OSError: .*403.*accept its terms",
}


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """A cache that a slow hub filled, what was found in it, and what was printed.

    The hub is out of order for the first five requests, and then no longer.
    """
    folders = ("home", "sst2", "glue", "large")
    home, sst2, glue, large = map(tmp_path_factory.mktemp, folders)
    for split, rows in datasets.load_from_disk(world / "dataset").items():
        rows.to_parquet(sst2 / f"{split}-0.parquet")
    for name in ("cola", "sst2"):
        written(glue / f"{name}.jsonl", JSONL.replace("film", name))
    head = "".join(map(CONFIG.format, ("cola", "sst2")))
    written(glue / "README.md", f"---\nconfigs:\n{head}---\n")
    load_causal_lm(world / "model").save_pretrained(large, max_shard_size="500KB")
    assert len(list(large.glob("*.safetensors"))) > 1
    models = {"gpt2": world / "model", "me/large": large, "me/closed": world / "model"}
    found = {"stanfordnlp/sst2": sst2, "me/closed": sst2, "nyu-mll/glue": glue}

    def fault(n):
        threading.Event().wait(0.05)
        return 503 if n < 5 else None

    refuse = {"me/closed": (403, "GatedRepo")}
    with hub.serve(models, found, fault, files=refuse) as address:
        environ = {"HF_ENDPOINT": address, "HF_HOME": str(home)}
        return str(home), *loads([*CACHED, *FORMS], **environ)


def test_models_and_data_sets_come_from_the_hub(served, world):
    """With one bar of text for gpt2: the reward model starts from the same weights."""
    _, (weights, ids, trunk, texts, large, *said, offline), printed = served
    assert printed.count("Download: 100%") == 1 and not offline
    parts = load_causal_lm(world / "model").parameters()
    total = pytest.approx(sum(p.abs().sum().item() for p in parts))
    assert weights == trunk == large == total
    assert ids == data.load_tokenizer(world / "model")("the plot is dull")["input_ids"]
    assert texts == data.load_reviews(TINY)["train"]["sentence"][:2]
    said = dict(zip(FORMS, map(str, said), strict=True))
    assert {x: s for x, s in said.items() if not re.match(FORMS[x], s)} == {}


@pytest.mark.slow
def test_what_is_cached_needs_no_hub(served):
    home, found, _ = served
    wait = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    with silent() as address:
        again, _ = loads(CACHED, HF_ENDPOINT=address, HF_HOME=home, **wait)
    assert again == [*found[: len(CACHED)], False]  # online, as it was before
