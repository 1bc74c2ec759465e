"""Anybody's data set as sentences with labels, or a sentence that says why not."""

import dataclasses
import gzip
import json
import re
import zipfile
from collections import Counter
from ssl import SSLCertVerificationError
from unittest.mock import Mock

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer

from tests.conftest import refused
from utils import data
from utils.settings import TINY

pytestmark = pytest.mark.faults
GOOD = {"sentence": ["fine", "bad"], "label": [1, 0]}


def made(folder, names=None, **splits):
    """A folder of `save_to_disk` with these columns for each split."""
    content = {name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()}
    content = datasets.DatasetDict(content)
    if names:
        content = content.cast_column("label", datasets.ClassLabel(names=names))
    content.save_to_disk(folder / "saved")
    return str(folder / "saved")


def both(**columns):
    return {"train": columns, "validation": columns}


def of(labels):
    """In both splits text 0, text 1, … with these labels."""
    return both(sentence=[f"text {i}" for i in range(len(labels))], label=labels)


def load(name, **settings):
    """What `load_reviews` gives, as {split: [(sentence, label), ...]}."""
    changed = dataclasses.replace(TINY, dataset_name=str(name), **settings)
    found = data.load_reviews(changed)
    assert list(found) == ["train", "validation"]
    for rows in found.values():  # no file of which stays open: Windows minds
        assert rows.column_names == ["sentence", "label"] and not rows.cache_files
    rows = {split: (rows["sentence"], rows["label"]) for split, rows in found.items()}
    return {split: list(zip(*columns, strict=True)) for split, columns in rows.items()}


# What stands in the label column; positive and negative label; what each row means
STARS, OTHER, NEG_POS = [5, 1, 3, 4, 2], [1, 0, None, 1, 0], ("neg", "pos")
WAYS = {
    "0, 1 and none": ([1, 0, 1, None], "1", "", [1, 0, 1, None]),
    "texts": (["positive", "negative", "Positive "], "positive", "", [1, 0, 1]),
    "stars, by bounds": (STARS, ">3", "<= 2", OTHER),
    "numbers as text": (["1", "0", " 1", "", " "], "1", "", [1, 0, 1, None, None]),
    "1 and 2, turned on purpose": ([1, 2], "1", "2", [1, 0]),
    "a text with a comma": (["good, fun", "bad"], "good, fun", "", [1, 0]),
    "a class by name": ([1, 0, -1], "POS", "", [1, 0, None], NEG_POS),
    "classes by number": ([4, 0, 2, 3, 1], "3,4", "<2", OTHER, "abcde"),
    "names that are numbers": ([4, 0, 2, 3, 1], ">=4", "1,2", OTHER, "12345"),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_of_every_kind(tmp_path, capsys, way):
    labels, positive, negative, meant, *names = WAYS[way]
    name = made(tmp_path, *map(list, names), **of(labels))
    found = load(name, positive_label=positive, negative_label=negative)
    rows = [(f"text {i}", y) for i, y in enumerate(meant) if y is not None]
    assert found == {"train": rows, "validation": rows}
    assert ("left out" in capsys.readouterr().out) == (None in meant)


TEXT, LABEL = "column 'sentence'.*{}.*text_column", "column 'label'.*{}.*label_column"
APART, FEW = LABEL.format("{}.*positive_label {}"), "{} rows of {}.*positive_label"
TO_TEST, SPLITS = {"validation_split": "test"}, "'train'.*{}.*validation_split"
SAME = {**GOOD, "label": [0, 0]}
WRONG = {  # splits, settings, and what is said
    "texts": (of(["good", "bad"]), {}, APART.format("good.*bad", "'1'")),
    "1 and 2, of which 1 is the worse": (of([1, 2]), {}, APART.format("1.*2", "'1'")),
    "a third": (of([*"abc"]), {"positive_label": "a"}, APART.format("b.*c", "'a'")),
    "no such label": (of([1, 0]), {"negative_label": "ill"}, LABEL.format("'ill'")),
    "of both": (of([1, 0]), {"negative_label": "1,0"}, LABEL.format("'1'.*'1,0'")),
    "no label": (both(sentence=["a"], stars=[1]), {}, LABEL.format("'stars'")),
    "as IMDB's": (both(text=["a"], label=[1]), {}, TEXT.format("'text'")),
    "numbers": (both(sentence=[3], label=[1]), {}, TEXT.format("holds 3")),
    "no train": ({"test": GOOD}, {}, r"\['test'\].*'train'"),
    "a typo": ({"train": GOOD}, TO_TEST, SPLITS.format("'test'")),
    "twice": (both(**GOOD), {"validation_split": "train"}, SPLITS.format("")),
    "of one kind": ({"train": GOOD, "test": SAME}, TO_TEST, FEW.format(2, "val")),
    "too few drawn": (of([0] * 39 + [1]), {"train_rows": 2}, FEW.format(2, "train")),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cannot_do(tmp_path, fault):
    splits, settings, says = WRONG[fault]
    refused(says, load, made(tmp_path, **splits), **settings)


def test_fewer_rows_are_drawn_from_train_the_same_for_every_seed(tmp_path):
    """In their order, fewer among the more, and none from validation."""
    name = made(tmp_path, **of([0, 1] * 20))
    rows, few = load(name)["train"], {n: load(name, train_rows=n) for n in (4, 10, 99)}
    four, ten = few[4]["train"], few[10]["train"]
    assert few[99] == load(name) and set(four) < set(ten)
    assert (len(four), len(ten)) == (4, 10)
    assert rows[:10] != ten == sorted(ten, key=rows.index)
    assert load(name, train_rows=10, seed=5) == {"train": ten, "validation": rows}


def test_a_tenth_of_train_is_kept_back(tmp_path, capsys):
    """Of each label, no sentence in both, and the same whatever the seed."""
    texts = [f"film {i}" for i in range(100)]
    texts += [f"{text} " for text in texts[:20]]  # some of them again
    columns = {"text": texts, "label": [int(i % 100 % 5 == 0) for i in range(120)]}
    name = made(tmp_path, train=columns, test=columns)  # as IMDB
    found = load(name, text_column="text")
    assert "'validation'" in (said := capsys.readouterr().out) and "kept back" in said
    everything = Counter(zip(texts, columns["label"], strict=True))
    assert Counter(found["train"]) + Counter(found["validation"]) == everything
    label_of = {text.strip(): label for text, label in found["validation"]}
    assert Counter(label_of.values()) == {0: 8, 1: 2}
    assert not label_of.keys() & {text.strip() for text, _ in found["train"]}
    assert load(name, text_column="text", seed=7) == found


ROWS = [{"sentence": f'film {i}, "so" to say', "label": i % 2} for i in range(40)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(separator):
    rows = (f'"film {i}, ""so"" to say"{separator}{i % 2}\n' for i in range(40))
    return f"sentence{separator}label\n" + "".join(rows)


CSV = table(",")
FILES = {
    "a name [with] *signs*, #1%20.csv": CSV,
    "windows.csv": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
    "semicolons.csv": table(";"),
    "tabs.tsv.gz": gzip.compress(table("\t").encode()),
    "small.csv.zip": lambda path: zipfile.ZipFile(path, "w").writestr("a.csv", CSV),
    "lines.jsonl": JSONL,
    "columns.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "folder": lambda path: written(path / "train-0.parquet", FILES["columns.parquet"]),
}


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("file", FILES)
def test_files_and_folders(tmp_path, file):
    folder = tmp_path / ("in a folder" if file == "folder" else "in [a] folder")
    if file == "folder":
        other = written(tmp_path / "in [a] folder" / file, FILES[file])
        refused("which is a pattern; rename it", load, other)
    found = load(written(folder / file, FILES[file]))
    rows = sorted((row["sentence"], row["label"]) for row in ROWS)
    assert sorted(found["train"] + found["validation"]) == rows
    assert len(found["validation"]) == 4


def test_a_file_by_a_relative_name_and_from_home_and_edited(tmp_path, monkeypatch):
    written(tmp_path / "mine.csv", CSV)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("mine.csv") == load("~/mine.csv")
    written(tmp_path / "mine.csv", CSV.replace("film", "picture"))
    assert load("mine.csv")["train"][0][0].startswith("picture")


ANEW, RAGGED = ".*; make it anew", "a,b\n" + "c,1\n" * 501 + "d,e,0\n"
NO_FILES = {  # what is in a file, and what is said; without it there is no such file
    "typo.csv": (None, "correct the name"),
    "sheet.xlsx": (b"PK", r"\.csv.*\.jsonl.*\.parquet"),
    "latin.csv": (CSV.encode() + b"caf\xe9,1\n", f"UnicodeDecodeError: 'utf-8'{ANEW}"),
    "ragged.csv": (RAGGED, f"Error tokenizing .*line 503, saw 3{ANEW}"),
    "empty": (lambda path: path.mkdir(), f"contain any data files{ANEW}"),
}


@pytest.mark.parametrize("file", NO_FILES)
def test_files_that_cannot_do(tmp_path, file):
    """The file's own fault is quoted, and no hub or token is blamed."""
    content, says = NO_FILES[file]
    if content is not None:
        written(tmp_path / file, content)
    says = f"{re.escape(repr(str(tmp_path / file)))}.*{says}"
    refused(says, load, tmp_path / file)


@pytest.fixture(scope="module")
def tokenizer(world):
    return data.load_tokenizer(str(world / "model"))


OTHERS = {  # what is said, of the error of another
    "PermissionError: .*; ask its owner for": PermissionError(13, "Denied"),
    "OSError: .*No space.*; make room": OSError(28, "No space left"),
    "OSError: .*Read-only.*; .*HF_HOME": OSError(30, "Read-only file system"),
    "self-signed.*SSL_CERT_FILE": SSLCertVerificationError(
        1, "certificate: self-signed"
    ),
    "NotFoundError: .*; install it": ModuleNotFoundError("No module 'x'"),
    "KeyError: .*; update the library": KeyError("a new kind"),
    "; correct HF_TOKEN$": UnicodeEncodeError("ascii", "hf_…", 3, 4, "no"),
    "disabled.*; unset HF_HUB_OFFLINE": OSError("outgoing traffic is disabled"),
}


@pytest.mark.parametrize("says", OTHERS)
def test_what_another_did_is_no_fault_of_what_is_loaded(monkeypatch, says):
    def load():
        with data.loading("model", "me/model"):
            raise RuntimeError("damaged, or not in the cache")

    monkeypatch.setattr(data, "repo_info", Mock(side_effect=OTHERS[says]))
    refused(rf"^cannot load the model '.*' \(.*{says}", load)


def test_a_tokenizer_without_an_end_or_without_words(tmp_path, world):
    endless = AutoTokenizer.from_pretrained(world / "model")
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    # Of a configuration alone the library makes a tokenizer, too
    AutoConfig.from_pretrained(world / "model").save_pretrained(tmp_path / "wordless")
    for name, says in (("endless", "EOS None"), ("wordless", "has [01] (words|token)")):
        refused(f"{name}' .*{says}", data.load_tokenizer, tmp_path / name)


@pytest.fixture(params=["$A", "$A {}", "{} $A {}"])
def adding(request, world):
    """Tokenizers that put EOS nowhere, behind a text, or before it (OPT's), too."""
    tokenizer = data.load_tokenizer(str(world / "model"))
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    adds = TemplateProcessing(request.param.replace("{}", eos[0]), special_tokens=[eos])
    tokenizer.backend_tokenizer.post_processor = adds
    tokenizer.front = [eos[1]] * request.param.startswith("{}")
    return tokenizer


def test_what_a_tokenizer_adds_is_no_fault_of_the_text(adding, tokenizer):
    """Clean, cut where too long, EOS behind and nothing else; and no EOS within."""
    eos, words = adding.eos_token_id, tokenizer("never dull")["input_ids"]
    rows = data.tokenize(["never dull ", "never " * 9_000], adding, max_tokens=6)
    texts = [adding.front + words, adding.front + tokenizer("never " * 5)["input_ids"]]
    assert rows == [text[:5] + [eos] for text in texts] and eos not in words
    assert data.encode(["never dull"], adding) == [[*adding.front, *words]]
    assert data.tokens_in_front(adding) == adding.front
    says, text = "holds the EOS token '<.endoftext.>'", f"{adding.eos_token} dull"
    refused(says, data.tokenize, ["a film", text], adding, max_tokens=10)


def test_prompts_are_beginnings_of_long_sentences_only(adding, tokenizer):
    """They begin as the tokenizer begins, and never end in EOS."""
    words = ["funny", "dull", "superb", "witty", "bland", "clever", "moving", "tender"]
    long = [f"the acting is {a} , but the plot is {b} ." for a in words for b in words]
    plain = data.make_prompts(long, tokenizer, TINY, seed=0)
    assert {len(p) for p in plain} == set(range(2, TINY.prompt_max_tokens + 1))
    assert not any(adding.eos_token_id in prompt for prompt in plain)
    prompts = data.make_prompts(long, adding, TINY, seed=0)
    assert prompts == [adding.front + prompt for prompt in plain]
    texts = ["never dull ", *(f"{text} " for text in long[:2]), long[0]]
    for seed in range(20):
        (one,) = data.make_prompts(texts, tokenizer, TINY, seed, exclude={long[1]})
        assert 2 <= len(one) <= 7 and long[0].startswith(tokenizer.decode(one))
    says = "1 sentences has 9 words.*prompt_max_tokens"
    refused(says, data.make_prompts, ["never dull"], tokenizer, TINY, seed=0)


def test_no_prompt_ends_within_a_letter(tokenizer):
    """Tokens that are bytes, as GPT-2's are where a letter is rare: 好 is three."""
    texts, found = [f"{letter * 9} a b c d e f g h" for letter in "好éb"], set()
    for seed in range(40):
        prompts = data.make_prompts(texts, tokenizer, TINY, seed)
        found |= set(map(tokenizer.decode, prompts))
    assert {"好", "好好", "é", "ééé", "bb", "bbb"} <= found
    assert not any("\ufffd" in text for text in found) and "" not in found


def test_padding_on_either_side_by_hand():
    """With 7, which ends a text, too: what is real is not told by the id."""
    padded = {"right": ([8, 7, 7], [1, 0, 0]), "left": ([7, 7, 8], [0, 0, 1])}
    for side, (row, real) in padded.items():
        ids, mask = data.pad([[5, 6, 7], [8]], pad_id=7, side=side)
        assert ids.tolist() == [[5, 6, 7], row] and mask.tolist() == [[1] * 3, real]


def test_batches_hold_every_row_once_and_little_padding():
    lengths = torch.randint(2, 60, (5003,), generator=torch.manual_seed(0)).tolist()
    batches = data.batch_indices(lengths, 32, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(5003))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert 1 - sum(lengths) / padded < 0.10
    assert batches == data.batch_indices(lengths, 32, seed=1)
    assert batches != data.batch_indices(lengths, 32, seed=2)
    means = [sum(lengths[i] for i in b) / len(b) for b in batches[:50]]
    assert means != sorted(means)  # shuffled: short batches do not all come first
