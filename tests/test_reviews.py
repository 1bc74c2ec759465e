"""Data sets of all forms become sentences with labels, or it is said why not."""

import bz2
import dataclasses
import gzip
import json
import random
import shutil
import zipfile
from collections import Counter

import datasets
import pytest

from utils import reviews
from utils.data import load_reviews
from utils.settings import TINY

pytestmark = pytest.mark.faults
GOOD = {"sentence": ["fine", "bad"], "label": [1, 0]}
POLAR = {"sentence": ["fine", "bad"] * 2, "label": ["positive", "negative"] * 2}


def made(folder, features=None, **splits):
    """A folder of `save_to_disk` with these columns for each split."""
    content = {
        name: datasets.Dataset.from_dict(columns, features=features)
        for name, columns in splits.items()
    }
    datasets.DatasetDict(content).save_to_disk(folder / "saved")
    return str(folder / "saved")


def load(name, **settings):
    """What `load_reviews` gives, as {split: [(sentence, label), ...]}."""
    named = dataclasses.replace(TINY, dataset_name=str(name), **settings)
    found = load_reviews(named)
    assert list(found) == ["train", "validation"]
    rows = {split: found[split] for split in found}
    assert all(split.column_names == ["sentence", "label"] for split in rows.values())
    assert all(type(y) is int for split in rows.values() for y in split["label"])
    return {
        split: list(zip(rows["sentence"], rows["label"], strict=True))
        for split, rows in rows.items()
    }


def refused(survived, fault, says, name, kind=ValueError, **settings):
    """One sentence that says so, and none of the data set's rows."""
    with pytest.raises(kind, match=says) as caught:
        load(name, **settings)
    assert "\n" not in str(caught.value)
    survived(f"data set: {fault}", str(caught.value))


def test_fewer_rows_are_drawn_from_train_the_same_for_every_seed(tmp_path):
    """In their order, fewer among the more, and none from validation."""
    many = {"sentence": [f"text {i}" for i in range(40)], "label": [0, 1] * 20}
    name = made(tmp_path, train=many, validation=many)
    everything = load(name)
    assert load(name, train_rows=40) == load(name, train_rows=99) == everything
    ten, twenty = (load(name, train_rows=n)["train"] for n in (10, 20))
    assert len(ten) == 10 and len(twenty) == 20
    assert ten != everything["train"][:10] and set(ten) < set(twenty)
    places = [everything["train"].index(row) for row in twenty]
    assert places == sorted(places)
    assert load(name, train_rows=10, seed=5)["train"] == ten
    assert load(name, train_rows=10)["validation"] == everything["validation"]


def test_rows_drawn_of_one_label_only_are_refused(tmp_path, survived):
    many = {"sentence": [f"text {i}" for i in range(40)], "label": [0] * 39 + [1]}
    name = made(tmp_path, train=many, validation=GOOD)
    refused(survived, "one label drawn", "train", name, train_rows=2)


def test_what_fits_comes_out_as_it_is(tmp_path, capsys):
    """Sentences to the last space, in their order; and nothing is said."""
    train = {
        "sentence": ["fine ", "bad ", " fine"],
        "label": [1, 0, 1],
        "idx": [4, 5, 6],
    }
    other = {**GOOD, "idx": [7, 8]}
    hidden = {"sentence": ["a", "b"], "label": [-1, -1], "idx": [1, 2]}  # as in SST-2
    found = load(made(tmp_path, train=train, validation=other, test=hidden))
    assert found == {
        "train": [("fine ", 1), ("bad ", 0), (" fine", 1)],
        "validation": [("fine", 1), ("bad", 0)],
    }
    assert capsys.readouterr().out == ""


def test_the_tiny_world_is_the_same_rows(world):
    name = str(world / "dataset")
    found = load(name)
    for split, rows in found.items():
        as_before = datasets.load_dataset(name)[split]
        texts, labels = as_before["sentence"], as_before["label"]
        assert rows == list(zip(texts, labels, strict=True))


# What stands in the label column; settings; which rows are positive and negative
WAYS = {
    "0 and 1": ([1, 0, 1], {}, [1, 0, 1]),
    "texts": (
        ["positive", "negative", "Positive "],
        {"positive": "positive"},
        [1, 0, 1],
    ),
    "-1 and +1": ([1, -1, 1], {}, [1, 0, 1]),
    "stars": (
        [5, 1, 3, 4, 2],
        {"positive": "4,5", "negative": "1,2"},
        [1, 0, None, 1, 0],
    ),
    "stars, by bounds": (
        [5, 1, 3, 4, 2],
        {"positive": ">=4", "negative": "<3"},
        [1, 0, None, 1, 0],
    ),
    "floats": ([1.0, 0.0, 1.0], {}, [1, 0, 1]),
    "scores": (
        [0.9, 0.2, 0.5, 0.51],
        {"positive": ">0.5", "negative": "<=0.5"},
        [1, 0, 0, 1],
    ),
    "truths": ([True, False], {}, [1, 0]),
    "numbers as text": (["1", "0", " 1"], {}, [1, 0, 1]),
    "words for truths": (["no", "yes"], {"positive": "YES"}, [0, 1]),
    "1 and 2": ([1, 2], {"positive": "2"}, [0, 1]),
    "1 and 2, turned on purpose": ([1, 2], {"positive": "1", "negative": "2"}, [1, 0]),
    "a text with a comma": (["good, fun", "bad"], {"positive": "good, fun"}, [1, 0]),
    "none here and there": ([1, None, 0], {}, [1, None, 0]),
    "blanks here and there": (["1", " ", "0", ""], {}, [1, None, 0, None]),
    "not a number here": ([1.0, float("nan"), 0.0], {}, [1, None, 0]),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_of_every_kind(tmp_path, capsys, survived, way):
    labels, wanted, meant = WAYS[way]
    columns = {"sentence": [f"text {i}" for i in range(len(labels))], "label": labels}
    settings = {f"{name}_label": value for name, value in wanted.items()}
    found = load(made(tmp_path, train=columns, validation=columns), **settings)
    rows = [(f"text {i}", y) for i, y in enumerate(meant) if y is not None]
    assert found == {"train": rows, "validation": rows}
    said = capsys.readouterr().out
    assert said.count("rows left out of") == (None in meant)
    survived(f"labels: {way}, {wanted}", said.replace("\n", "; ") or "as they are")


@pytest.mark.parametrize("positive", ["1", "pos", "POS", "positive,pos"])
def test_a_class_label_by_number_or_by_name(tmp_path, positive):
    labels = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": labels}
    )
    columns = {"sentence": ["fine", "bad", "?"], "label": [1, 0, -1]}  # -1: none
    name = made(tmp_path, features, train=columns, validation=columns)
    assert load(name, positive_label=positive)["train"] == [("fine", 1), ("bad", 0)]


def test_names_that_are_numbers_count_and_not_their_places(tmp_path):
    """Five stars stand at place 4, and four stars at place 3."""
    stars = datasets.ClassLabel(names=["1", "2", "3", "4", "5"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": stars})
    columns = {"sentence": list("abcde"), "label": [0, 1, 2, 3, 4]}
    name = made(tmp_path, features, train=columns, validation=columns)
    found = load(name, positive_label="4,5", negative_label="1,2")["train"]
    assert found == [("a", 0), ("b", 0), ("d", 1), ("e", 1)]


def test_what_the_labels_mean_is_said_and_what_is_left_out(tmp_path, capsys):
    columns = {
        "sentence": ["a", "b", "c", None, "  ", "d"],
        "label": [5, 1, 3, 5, 1, None],
    }
    name = made(tmp_path, train=columns, validation=columns)
    load(name, positive_label="5", negative_label="1")
    assert capsys.readouterr().out == (
        "labels: positive is '5' (4 rows), negative is '1' (4 rows)\n"
        f"rows left out of {name}: 2 of another label, 4 without a text, "
        "2 without a label\n"
    ).replace("'5'", "5").replace("'1'", "1")


LABELS = {
    "texts at the default": (
        ["positive", "negative"],
        {},
        r"positive_label is '1', but column 'label' .* holds 'negative' \(4 rows\), "
        r"'positive' \(4 rows\); .* positive_label='positive' and neg",
    ),
    "stars at the default": (
        [1, 2, 3, 4, 5],
        {},
        r"more than one label is not '1': column 'label' .* 1 \(4 rows\), .*, for "
        "example positive_label='4,5' and negative_label='1,2'$",
    ),
    "five classes": (
        ["sad", "glad", "mad", "bad", "odd"],
        {},
        "positive_label is '1', but .* 'bad' .* positive_label='odd,sad' and ",
    ),
    "scores": (
        [i / 100 for i in range(30)],
        {},
        r"positive_label is '1', but .* 30 different labels from 0.0 to 0.29 \(120 "
        r"rows\); .* positive_label='>0.15' and negative_label='<=0.15'$",
    ),
    "1 and 2, of which 1 is the worse": (
        [1, 2],
        {},
        r"positive_label is '1', the lower one, but .* positive_label='2'",
    ),
    "three, one of them named": (
        ["good", "bad", "none"],
        {"positive_label": "good"},
        "more than one label is not 'good': .* negative_label=",
    ),
    "a negative one that is not there": (
        ["good", "bad"],
        {"positive_label": "good", "negative_label": "ill"},
        "negative_label is 'ill', but .* negative_label='bad'",
    ),
    "one that is both": (
        [1, 2, 3],
        {"positive_label": "2,3", "negative_label": "1,2"},
        "both positive_label '2,3' and negative_label '1,2' mean 2; let them",
    ),
    "one only": ([1, 1], {}, r"nothing but 1 \(8 rows\), so .* label_column"),
    "none": ([None, None], {}, "holds no label, so there is nothing to tell apart"),
    "texts instead": (
        [f"this is text {i}" for i in range(30)],
        {},
        "holds 30 different labels from 'this is text 0' .*another column with label_c",
    ),
    "lists": ([[1], [0, 1]], {}, r"holds \[1\], and no label; .*label_column"),
}


@pytest.mark.parametrize("fault", LABELS)
def test_labels_that_cannot_do(tmp_path, survived, fault):
    labels, settings, says = LABELS[fault]
    columns = {
        "sentence": [f"t {i}" for i in range(2 * len(labels))],
        "label": labels * 2,
    }
    name = made(tmp_path, train=columns, validation=columns)
    refused(survived, f"labels: {fault}", says, name, **settings)


@pytest.mark.parametrize(
    "fault", [fault for fault in LABELS if "positive_label='" in LABELS[fault][2]]
)
def test_the_example_in_the_sentence_is_a_cure(tmp_path, fault):
    """Whoever types it gets rows of both kinds."""
    labels, settings, _ = LABELS[fault]
    columns = {"sentence": [f"t {i}" for i in range(len(labels))], "label": labels}
    name = made(tmp_path, train=columns, validation=columns)
    with pytest.raises(ValueError, match="for example") as caught:
        load(name, **settings)
    words = str(caught.value).split("for example ")[1].split(" and ")
    cure = dict(word.replace("'", "").split("=", 1) for word in words)
    rows = load(name, **{**settings, **cure})["train"]
    assert {label for _, label in rows} == {0, 1}


COLUMNS = {
    "as IMDB's": (
        {"text": ["fine", "bad"], "label": [1, 0]},
        {},
        r"no column 'sentence', only \['text', 'label'\]; name its .* text_column",
    ),
    "a near name": (
        {"id": ["x", "y"], "sentences": ["fine", "bad"], "label": [1, 0]},
        {},
        "no column 'sentence', only .*'sentences'.* the setting text_column",
    ),
    "both others": (
        {"review": ["fine", "bad"], "sentiment": ["p", "n"]},
        {},
        "no column 'sentence', only .*; name its own with .* text_column",
    ),
    "others, in another order": (
        {"id": [7, 8, 9], "stars": [1, 5, 5], "words": ["a film", "bad", "so so"]},
        {},
        "no column 'sentence', only .*; name its own with .* text_column",
    ),
    "a first line that is a row already": (
        {"A film " + "that goes on and on " * 4: ["x"], "0": [1]},
        {},
        "only .'A film that .*; .*in a file, names stand on top",
    ),
    "numbers": (
        {"sentence": [3, 4], "label": [1, 0]},
        {},
        "row 0 of train in column 'sentence' .* is 3, and no text; .* text_column",
    ),
    "lists of words": (
        {"sentence": [["a", "film"], ["b"]], "label": [1, 0]},
        {},
        r"is \['a', 'film'\], and no text; name the column that holds the text, of",
    ),
    "no text at all": (
        {"sentence": [None, " "], "label": [1, 0]},
        {},
        "no row of split 'train' .* has a text and a label that .* text_column",
    ),
}


@pytest.mark.parametrize("fault", COLUMNS)
def test_columns_that_cannot_do(tmp_path, survived, fault):
    columns, settings, says = COLUMNS[fault]
    name = made(tmp_path, train=columns, validation=columns)
    refused(survived, f"columns: {fault}", says, name, **settings)


def many():
    """IMDB's columns: a hundred reviews, a fifth positive, and some of them again."""
    texts = [f"film {i}" for i in range(100)]
    labels = [int(i % 5 == 0) for i in range(100)]
    again = [f"{text} " for text in texts[:20]]
    return {"text": texts + again, "label": labels + labels[:20]}


def test_a_share_of_train_is_kept_back(tmp_path, capsys, survived):
    """A tenth of each label, no sentence in both, the same whatever the seed."""
    columns = many()
    name = made(tmp_path, train=columns, test=columns)
    found = load(name, text_column="text")
    train, held = found["train"], found["validation"]
    said = capsys.readouterr().out
    assert said == (
        "no rows in a split 'validation' of ['train', 'test']: of train, "
        f"{len(held)} rows are kept back for it, and {120 - len(held)} left\n"
    )
    assert Counter(train) + Counter(held) == Counter(
        zip(columns["text"], columns["label"], strict=True)
    )
    unique = {text.strip(): label for text, label in held}
    assert Counter(unique.values()) == {0: 8, 1: 2}
    assert not unique.keys() & {text.strip() for text, _ in train}
    random.seed(5)
    assert load(name, text_column="text", seed=7) == found
    more = load(name, text_column="text", validation_share=0.3)["validation"]
    assert len({text.strip() for text, _ in more}) == 30
    survived("data set: IMDB's columns and splits", said)


def test_the_splits_can_be_named(tmp_path):
    splits = {"learn": GOOD, "check": {"sentence": ["so", "no"], "label": [1, 0]}}
    name = made(tmp_path, **splits)
    found = load(name, train_split="learn", validation_split="check")
    assert found["train"] == [("fine", 1), ("bad", 0)]
    assert found["validation"] == [("so", 1), ("no", 0)]


@pytest.mark.parametrize(
    "splits, settings, says",
    [
        ({"test": GOOD}, {}, "no rows in a split 'train', only {'test': 2}; .*_split"),
        (
            {"train": GOOD, "dev": GOOD},
            {"validation_split": "dve"},
            "no rows in a split 'dve', only .* validation_split",
        ),
        (
            {"train": GOOD, "validation": {"sentence": ["a", "b"], "label": [0, 0]}},
            {},
            "all 2 rows of split 'validation' .* are negative, so",
        ),
        (
            {"train": {"sentence": ["a", " "], "label": [1, 0]}, "validation": GOOD},
            {},
            "all 1 rows of split 'train' .* are positive, so",
        ),
        ({"train": GOOD}, {}, "only 1 different positive .*too few to keep some back"),
        (
            {"train": {"sentence": ["fine"], "label": [1]}},
            {},
            r"holds nothing but 1 \(1 rows\), so there is nothing to tell apart",
        ),
    ],
)  # fmt: skip
def test_splits_that_cannot_do(tmp_path, survived, splits, settings, says):
    name = made(tmp_path, **splits)
    refused(survived, f"splits: {splits}", says, name, **settings)


def test_an_empty_split_is_none(tmp_path, capsys):
    """As the library gives it; a folder with one it may not even load."""
    empty = datasets.Dataset.from_dict({"sentence": [], "label": []})
    full = datasets.Dataset.from_dict(GOOD)
    found = datasets.DatasetDict(train=full, validation=empty)
    assert list(reviews.choose_splits(found, TINY)) == ["train"]
    says = "no rows in a split 'train', only {'train': 0, 'validation': 2}"
    with pytest.raises(ValueError, match=says):
        reviews.choose_splits({"train": empty, "validation": full}, TINY)


@pytest.mark.parametrize(
    "one, other, value",
    [("text_column", "label_column", "a"), ("train_split", "validation_split", "all")],
)
def test_two_settings_that_must_differ(one, other, value):
    with pytest.raises(ValueError, match=f"{one} and {other} are both '{value}'; set"):
        dataclasses.replace(TINY, **{one: value, other: value})


CSV = "sentence,label\n" + "".join(
    f'"film {i}, ""so"" to say",{i % 2}\n' for i in range(40)
)
ROWS = [{"sentence": f'film {i}, "so" to say', "label": i % 2} for i in range(40)]


def zipped(text):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("inside.csv", text)

    return write


def table(separator):
    rows = [["sentence", "label"], *([f"film {i}", f"{i % 2}"] for i in range(40))]
    return "".join(separator.join(row) + "\n" for row in rows)


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES = {
    "plain.csv": lambda path: path.write_text(CSV),
    "UPPER.CSV": lambda path: path.write_text(CSV),
    "a name [with] *signs*, #1%20.csv": lambda path: path.write_text(CSV),
    "windows.csv": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()
    ),
    "semicolons.csv": lambda path: path.write_text(table(";")),
    "tabs.tsv": lambda path: path.write_text(table("\t")),
    "small.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "small.csv.bz2": lambda path: path.write_bytes(bz2.compress(CSV.encode())),
    "small.csv.zip": zipped(CSV),
    "lines.jsonl": lambda path: path.write_text(JSONL),
    "lines.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL.encode())),
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "columns.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
}


@pytest.mark.parametrize("file", FILES)
def test_a_single_file(tmp_path, file):
    path = tmp_path / "a folder" / file
    path.parent.mkdir()
    FILES[file](path)
    found = load(path)
    sentences = [row["sentence"] for row in ROWS]
    if file in ("semicolons.csv", "tabs.tsv"):
        sentences = [f"film {i}" for i in range(40)]
    both = sorted(found["train"] + found["validation"])
    assert both == sorted((s, i % 2) for i, s in enumerate(sentences))
    assert len(found["validation"]) == 4


def test_a_file_that_was_edited_is_read_again(tmp_path):
    path = tmp_path / "edited.csv"
    path.write_text(CSV)
    load(path)
    path.write_text(CSV.replace("film", "picture"))
    assert load(path)["train"][0][0].startswith("picture")


def test_a_file_by_a_relative_name_and_from_home(tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text(CSV)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load("mine.csv") == load("~/mine.csv")


def test_what_save_to_disk_makes(tmp_path):
    """Both kinds; a folder of data files loads as ever."""
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, validation=one).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "files" / f"{split}.csv").write_text(CSV)
    assert len(load(tmp_path / "one")["validation"]) == 4
    assert load(tmp_path / "splits") == load(tmp_path / "files")


def empty_folder(path):
    path.mkdir()


NO_FILES = {
    "typo.csv": (
        None,
        FileNotFoundError,
        "no file 'typo.csv' .*; the nearest is 'typ0",
    ),
    "other.csv": (
        None,
        FileNotFoundError,
        "no file 'other.csv' in .*dataset_name",
    ),
    "nowhere/a.jsonl": (
        None,
        FileNotFoundError,
        "there is no file 'a.jsonl' in '.*now",
    ),
    "sheet.xlsx": (
        b"PK",
        ValueError,
        "sheet.xlsx' is no CSV, JSONL or Parquet file by",
    ),
    "all.zip": (b"PK", ValueError, "all.zip' is no CSV, JSONL or Parquet file by"),
    "empty.csv": (b"", ValueError, "the file .* no data set .*; save it in UTF-8"),
    "names only.csv": (b"sentence,label\n", ValueError, "the file .* no data"),
    "latin.csv": (CSV.encode() + b"caf\xe9,1\n", ValueError, r"\(Unicode.*; .*UTF-8"),
    "ragged.csv": (b"a,b\nc,1\nd,e,0\n", ValueError, r"\(.*line 3, saw 3\); save"),
    "torn.jsonl": (b'{"sentence": "a"}\n{"sent', ValueError, r"\(ArrowInvalid: JSON"),
    "torn.parquet": (b"PAR1", ValueError, r"\(ArrowInvalid: Parquet"),
    "empty": (empty_folder, ValueError, "holds no data set .*put CSV, JSONL or Parq"),
}


@pytest.mark.parametrize("file", NO_FILES)
def test_files_that_cannot_do(tmp_path, survived, file):
    content, kind, says = NO_FILES[file]
    (tmp_path / "typ0.csv").write_text(CSV)
    if content is empty_folder:
        empty_folder(tmp_path / file)
    elif content is not None:
        (tmp_path / file).write_bytes(content)
    refused(survived, file, says, tmp_path / file, kind)


def test_a_folder_with_several_configurations(tmp_path, survived):
    """As the hub's, but here."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(JSONL.replace("film", name))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: a\n  data_files: one.jsonl\n"
        "- config_name: b\n  data_files: two.jsonl\n---\n"
    )
    says = (
        r"is several in one; choose .* one of 'a', 'b', with the setting dataset_config"
    )
    refused(survived, "no configuration", says, tmp_path)
    refused(survived, "another one", says, tmp_path, dataset_config="c")
    assert load(tmp_path, dataset_config="b")["train"][0][0].startswith("two")


def test_a_label_is_what_a_setting_says():
    assert reviews.is_meant((1,), "1") and reviews.is_meant((1.0,), "1")
    assert reviews.is_meant(("+1",), "1") and reviews.is_meant(("<unk>",), "<unk>")
    assert not reviews.is_meant((1,), "11") and not reviews.is_meant(("a",), ">3")
    assert not reviews.is_meant((3,), ">3,<3") and reviews.is_meant((3,), ">= 3")


def test_nothing_stays_open_of_what_was_read(tmp_path):
    """The folder can be replaced while its rows are in use (Windows minds)."""
    name = made(tmp_path, train=GOOD, validation=GOOD)
    found = load_reviews(dataclasses.replace(TINY, dataset_name=name))
    assert found["train"].cache_files == []
    shutil.rmtree(name)
    assert found["train"]["sentence"][:] == ["fine", "bad"]
