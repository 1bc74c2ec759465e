"""The real loading code, `gpt2` and `stanfordnlp/sst2`, against a hub on loopback."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests import hub
from tests.conftest import ROOT
from utils.data import load_reviews
from utils.models import load_causal_lm
from utils.settings import TINY

pytestmark = pytest.mark.faults
LOAD = """
import json, sys
import torch
from utils.data import load_reviews, load_tokenizer
from utils.models import RewardModel, load_causal_lm
from utils.settings import FULL

tokenizer = load_tokenizer(FULL.model_name)
model = load_causal_lm(FULL.model_name).eval()
RewardModel.from_pretrained(FULL.model_name)
reviews = load_reviews(FULL)
ids = tokenizer("the plot is dull")["input_ids"]
print(json.dumps({
    "ids": ids,
    "logits": model(torch.tensor([ids])).logits[0, -1, :5].tolist(),
    "rows": {name: len(split) for name, split in reviews.items()},
    "first": reviews["train"]["sentence"][0],
}))
"""


def load(code=LOAD, *arguments, **environ):
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "RLHF_", "TQDM_"))
    }
    environ = {**ours, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environ}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=90,
    )


def repositories(world):
    return {"gpt2": world / "model"}, {"stanfordnlp/sst2": world / "dataset"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of the cache that `loaded` leaves behind."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first_load(world, home):
    """What was found, and what was printed meanwhile."""
    with hub.serve(*repositories(world)) as address:
        done = load(HF_ENDPOINT=address, HF_HOME=str(home))
    assert done.returncode == 0, done.stderr[-3000:]
    *said, found = done.stdout.splitlines()
    return json.loads(found), "".join(said)


@pytest.fixture(scope="module")
def loaded(first_load):
    return first_load[0]


def test_a_download_has_one_bar_of_text_on_stdout(first_load):
    """Once: the reward model starts from the weights that are there then."""
    assert first_load[1].count("Download: 100%") == 1


def test_model_and_tokenizer_come_from_the_hub(loaded, world):
    model = load_causal_lm(world / "model").eval()
    logits = model(torch.tensor([loaded["ids"]])).logits[0, -1, :5]
    torch.testing.assert_close(torch.tensor(loaded["logits"]), logits)


def test_the_data_set_comes_from_the_hub(loaded, world):
    reviews = load_reviews(TINY)
    assert loaded["rows"] == {name: len(split) for name, split in reviews.items()}
    assert loaded["first"] == reviews["train"]["sentence"][0]


FAULTY = """
import json
from utils.data import load_reviews
from utils.models import load_causal_lm
from utils.settings import FULL

said = {}
for what, load, name in (
    ("model", load_causal_lm, "gpt2"), ("data set", load_reviews, FULL)
):
    try:
        load(name)
        said[what] = "loaded"
    except Exception as error:
        said[what] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def tried(address, home, **environ):
    """What became of the model and of the data set."""
    done = load(FAULTY, HF_ENDPOINT=address, HF_HOME=str(home), **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def never_answers():
    """A hub that accepts every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def nobody():
    """An address where nobody listens, as without a network."""
    with never_answers() as address:
        return contextlib.nullcontext(address)


OWN = """
import dataclasses, json, sys
from utils.data import load_reviews
from utils.settings import FULL

said = []
for name, config in json.loads(sys.argv[1]):
    named = dataclasses.replace(FULL, dataset_name=name, dataset_config=config)
    try:
        said.append(load_reviews(named)["train"]["sentence"][:])
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


def test_data_sets_of_other_forms(tmp_path, survived):
    """Several in one, as `glue`; none but a script; nothing at all."""
    for name in ("sst2", "cola"):
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [{"sentence": f"{name} {y}", "label": y} for y in (0, 1)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text)
    (tmp_path / "glue" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: cola\n  data_files:\n"
        "  - {split: train, path: cola/train.jsonl}\n"
        "  - {split: validation, path: cola/validation.jsonl}\n"
        "- config_name: sst2\n  data_files:\n"
        "  - {split: train, path: sst2/train.jsonl}\n"
        "  - {split: validation, path: sst2/validation.jsonl}\n---\n"
    )
    for name in ("script", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "script" / "script.py").write_text("import datasets\n")
    (tmp_path / "empty" / "README.md").write_text("nothing here\n")
    glue = "nyu-mll/glue"
    chosen = rf"^ValueError: data set '{glue}' is several in one; .* one of {{}}, with "
    both = chosen.format("'?cola'?, '?sst2'?")
    plain = "^ValueError: the data set '{}' is not one of plain data files .*name anoth"
    cases = {
        (glue, ""): both,
        (glue, "sst"): both,
        ("me/script", ""): plain.format("me/script"),
        ("me/empty", ""): plain.format("me/empty"),
        ("glue/sst2", ""): "^FileNotFoundError: .* no public .*dataset_config",
        ("nyu-mll/glue/sst2", ""): "^FileNotFoundError: .*; .*dataset_config",
        (glue, "sst2"): ["sst2 0", "sst2 1"],
        (glue, "cola"): ["cola 0", "cola 1"],
    }
    served = {n: tmp_path / n.split("/")[1] for n in (glue, "me/script", "me/empty")}
    home, names = str(tmp_path / "home"), json.dumps(list(cases))
    with hub.serve({}, served) as address:
        done = load(OWN, names, HF_ENDPOINT=address, HF_HOME=home)
    said = json.loads(done.stdout.splitlines()[-1])
    for (case, says), sentence in zip(cases.items(), said, strict=True):
        if isinstance(says, list):
            assert sentence == says
        else:
            assert re.search(says, sentence), sentence
            survived(f"hub: {' '.join(case)}", sentence)
    # From the cache alone
    names = json.dumps([(glue, ""), (glue, "sst2")])
    done = load(OWN, names, HF_HUB_OFFLINE="1", HF_HOME=home)
    asked, again = json.loads(done.stdout.splitlines()[-1])
    assert again == cases[glue, "sst2"]
    assert re.search(both, asked), asked


IMPATIENT = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
FAULTS = {
    "always 503": lambda *good: hub.serve(*good, lambda n: 503),
    "slow": lambda *good: hub.serve(*good, lambda n: time.sleep(0.3)),
    "503 at first": lambda *good: hub.serve(*good, lambda n: 503 if n < 5 else None),
    "missing": lambda *good: hub.serve({}, {}),
    "no answer": lambda *good: never_answers(),
    "no network": lambda *good: nobody(),
}
MISSING = "^FileNotFoundError: the Hugging Face Hub has no public {what} '.*correct"
FAILED = (
    r"^ConnectionError: the {what} '[^']+' could not be had from the Hugging Face Hub "
    r"\(.+\); try again later, name a local folder, or take the preset 'tiny', which "
    "downloads nothing$"
)


@pytest.fixture(scope="module")
def said(world, tmp_path_factory):
    """What each fault makes of model and data set; three at a time, for they wait."""

    def meet(fault):
        waits = IMPATIENT if fault == "no answer" else {}
        with FAULTS[fault](*repositories(world)) as address:
            return tried(address, tmp_path_factory.mktemp("home"), **waits)

    with ThreadPoolExecutor(3) as pool:
        return {fault: pool.submit(meet, fault) for fault in FAULTS}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "data set"])
@pytest.mark.parametrize(
    "fault, says",
    [
        ("always 503", FAILED),
        ("slow", "^loaded$"),
        ("503 at first", "^loaded$"),
        ("missing", MISSING),
        ("no answer", FAILED),
        ("no network", FAILED),
    ],
)
def test_a_hub_that_fails(said, survived, fault, says, what):
    sentence = said[fault].result()[what]
    assert re.search(says.format(what=what), sentence), sentence
    survived(f"hub: {fault} ({what})", sentence)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, environ",
    [
        ("no network", {}),
        ("no answer", IMPATIENT),
        ("no answer", {"HF_HUB_OFFLINE": "1"}),
    ],
)
def test_what_is_cached_needs_no_hub(loaded, home, survived, fault, environ):
    code = LOAD + "\nimport huggingface_hub\nprint(huggingface_hub.is_offline_mode())"
    with FAULTS[fault]() as address:
        done = load(code, HF_ENDPOINT=address, HF_HOME=str(home), **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, values, offline = done.stdout.splitlines()
    assert json.loads(values) == loaded
    assert offline == str("HF_HUB_OFFLINE" in environ)  # as it was before
    survived(f"hub: {fault}, all in the cache", f"loaded, with {environ}")


DAMAGED = "^ValueError: the .*{what} '[^']+' was downloaded, but cannot be .* delete"


def halve(cache, *files):
    for name in files:
        (file,) = cache.rglob(name)
        content = file.resolve().read_bytes()
        file.resolve().write_bytes(content[: len(content) // 2])


@pytest.mark.slow
def test_a_damaged_cache_is_named(world, loaded, home, tmp_path, survived):
    cache = shutil.copytree(home, tmp_path / "cache", symlinks=True)

    def damaged(address, *files):
        halve(cache, *files)
        said = tried(address, cache)
        for file, (what, sentence) in zip(files, said.items(), strict=True):
            assert re.search(DAMAGED.format(what=what), sentence), sentence
            survived(f"hub: {file} cut off in the cache", sentence)
        return " ".join(said.values())

    with hub.serve(*repositories(world)) as address:
        sentences = damaged(address, "config.json", "*-train.arrow")
        for folder in re.findall(f"{re.escape(str(cache))}/[a-z]+(?= )", sentences):
            shutil.rmtree(folder, ignore_errors=True)
        assert set(tried(address, cache).values()) == {"loaded"}
        shutil.rmtree(cache / "datasets")  # else the downloaded files are not read
        damaged(address, "model.safetensors", "train-*.parquet")


@pytest.mark.slow
def test_a_download_that_was_cut_off_is_begun_again(
    world, loaded, home, tmp_path, survived
):
    cache = shutil.copytree(home, tmp_path / "cache", symlinks=True)
    shutil.rmtree(cache / "datasets")
    halve(cache, "model.safetensors", "train-*.parquet")
    for file in ("model.safetensors", "train-*.parquet"):
        (pointer,) = cache.rglob(file)
        blob = pointer.resolve()
        blob.rename(f"{blob}.incomplete")
        pointer.unlink()
    with hub.serve(*repositories(world)) as address:
        assert set(tried(address, cache).values()) == {"loaded"}
    survived("hub: a download was cut off", "it is begun again")
