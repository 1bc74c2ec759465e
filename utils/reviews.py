"""Anybody's labelled texts as sentences with the labels 1 (positive) and 0.

The settings say where they lie, and what columns, splits and labels are called there.
Whatever does not fit is said in one sentence that names the setting for it.
"""

import difflib
import glob
import operator
import random
import re
from collections import Counter
from pathlib import Path

import datasets

from utils.inputs import loading

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
MANY = 20  # more different labels than this are rather scores, or texts


def read_dataset(name: str, config: str = "") -> datasets.DatasetDict:
    """The splits of a data set as they are.

    `name` is a name on the hub, a folder (of data files, or of `save_to_disk`) or a
    file: CSV, JSON, JSONL or Parquet, which may be compressed. Raises the errors of
    `loading`, FileNotFoundError for a file that is not there, and ValueError for one
    of another kind.
    """
    path = Path(name).expanduser()
    name = str(path) if name.startswith("~") else name
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if path.is_file() and kind is None:
        raise ValueError(
            f"{name!r} is no CSV, JSONL or Parquet file by its name; save it as one, "
            "and name that with the setting dataset_name"
        )
    if kind and not path.exists():
        raise FileNotFoundError(_no_file(path))
    with loading("data set", name):
        if path.is_file():
            options = {"sep": _separator(path)} if kind == "csv" else {}
            found = datasets.load_dataset(kind, data_files=glob.escape(name), **options)
        elif any((path / file).is_file() for file in SAVED):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config or None)
    return found if isinstance(found, dict) else datasets.DatasetDict(train=found)


def _no_file(path):
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"the nearest is {near[0]!r}" if near else "correct dataset_name"
    return f"there is no file {path.name!r} in {str(path.parent.resolve())!r}; {hint}"


def _separator(path):
    """What stands between the columns, from the line of their names."""
    if path.suffix.lower() in PACKED:
        return "\t" if ".tsv" in path.name.lower() else ","
    with path.open(encoding="utf8", errors="replace") as file:
        return max(",;\t", key=file.readline().count)


def choose_splits(found, settings) -> dict:
    """The splits `train` and, if the data set has one, `validation`.

    Raises ValueError if there is no split to train on, or none of another name that
    `validation_split` was set to.
    """
    named = {"train": settings.train_split, "validation": settings.validation_split}
    splits = {
        name: found[split]
        for name, split in named.items()
        if split in found and len(found[split])
    }
    for name, split in named.items():
        if name not in splits and (name == "train" or split != "validation"):
            rows = {split: len(rows) for split, rows in found.items()}
            raise ValueError(
                f"data set {settings.dataset_name!r} has no rows in a split {split!r}, "
                f"only {rows}; name one of these with the setting {name}_split"
            )
    return splits


def sentences_and_labels(splits: dict, settings) -> dict[str, dict[str, list]]:
    """The columns `sentence` and `label` (0 or 1) of each split, in the same order.

    Rows without a text or a label, and those whose label the settings do not name,
    are left out, which is said. Raises ValueError if there are no
    such columns, or if what is in them is no text, or no label of the settings.
    """
    _check_columns(splits, settings)
    texts = {name: _texts(rows, name, settings) for name, rows in splits.items()}
    labels = {name: _labels(rows, settings) for name, rows in splits.items()}
    counts = Counter(label for some in labels.values() for label in some if label)
    meaning = _meaning(counts, settings)
    columns, left_out = {}, Counter()
    for name in splits:
        kept = []
        for text, label in zip(texts[name], labels[name], strict=True):
            if not text.strip():
                left_out["without a text"] += 1
            elif label is None:
                left_out["without a label"] += 1
            elif meaning[label] is None:
                left_out["of another label"] += 1
            else:
                kept.append((text, meaning[label]))
        columns[name] = {
            "sentence": [text for text, _ in kept],
            "label": [label for _, label in kept],
        }
    _say(counts, meaning, left_out, settings)
    return columns


def _check_columns(splits, settings):
    for rows in splits.values():
        for field in ("text_column", "label_column"):
            if (column := getattr(settings, field)) not in rows.column_names:
                raise ValueError(
                    f"data set {settings.dataset_name!r} has no column {column!r}, "
                    f"only {str(rows.column_names)[:300]}; name its own with the "
                    f"setting {field} (in a file, names stand on top, commas between)"
                )


def _texts(rows, name, settings):
    texts = ["" if text is None else text for text in rows[settings.text_column][:]]
    where = f"column {settings.text_column!r} of data set {settings.dataset_name!r}"
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"row {i} of {name} in {where} is {repr(text)[:60]}, and no text; name "
                f"the column that holds the text, of {rows.column_names}, with "
                "text_column"
            )
    return texts


def _labels(rows, settings):
    """Each label in all its spellings, as a tuple; None where there is none."""
    values = rows[settings.label_column][:]
    feature = rows.features[settings.label_column]
    if isinstance(feature, datasets.ClassLabel):
        # Where names are numbers themselves (stars), those count, and not their places
        spelled = {
            i: (name,) if _number(name) is not None else (i, name)
            for i, name in enumerate(feature.names)
        }
        return [spelled.get(value) for value in values]  # -1 is none
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"column {settings.label_column!r} of data set "
                f"{settings.dataset_name!r} holds {repr(value)[:60]}, and no label; "
                f"name another, of {rows.column_names}, with the setting label_column"
            )
    missing = (None, "")
    return [
        None if value != value or value in missing else (value,)
        for value in (v.strip() if isinstance(v, str) else v for v in values)
    ]


def _number(value):
    try:
        return float(value)
    except ValueError:
        return None


def is_meant(label: tuple, wanted: str) -> bool:
    """Whether one of a label's spellings is what a setting says.

    It says one label or several between commas, as text or as numbers (1 is 1.0 and
    True), or a bound such as >3 or <=0.5.
    """
    for part in (wanted, *wanted.split(",")):
        sign, text = re.fullmatch(r"\s*([<>]=?|)(.*?)\s*", part, re.DOTALL).groups()
        for spelling in label:
            a, b = _number(spelling), _number(text)
            both = a is not None and b is not None
            if both and COMPARE.get(sign, operator.eq)(a, b):
                return True
            if str(spelling).casefold() == part.strip().casefold():
                return True
    return False


def _order(label):
    number = _number(label[0])
    return (number is None, number or 0, str(label[0]))


def _meaning(counts, settings):
    """For each label 1 (positive), 0 (negative) or None (neither)."""
    wanted = {1: settings.positive_label, 0: settings.negative_label}
    meant = {y: {k for k in counts if is_meant(k, wanted[y])} for y in wanted}
    if not settings.negative_label:
        meant[0] = counts.keys() - meant[1]
    if fault := _fault(counts, meant, settings):
        raise ValueError(fault)
    return {k: next((y for y in meant if k in meant[y]), None) for k in counts}


def _fault(counts, meant, settings):
    """What is wrong with the labels, in a sentence with the remedy; or None."""
    labels = sorted(counts, key=_order)
    column = f"column {settings.label_column!r} of data set {settings.dataset_name!r}"
    if len(labels) < 2:
        only = f"nothing but {_listed(labels, counts)}" if labels else "no label"
        return (
            f"{column} holds {only}, so there is nothing to tell apart; name another "
            "one with the setting label_column, or another data set"
        )
    said = f"{column} holds {_listed(labels, counts)}"
    if both := sorted(meant[1] & meant[0], key=_order):
        return (
            f"{said}, of which both positive_label {settings.positive_label!r} and "
            f"negative_label {settings.negative_label!r} mean {both[0][-1]!r}; "
            "let them mean different ones"
        )
    asked = f"{said}; name another column with label_column, or what is "
    asked += "positive and what negative, for example "
    asked += _example(labels)
    if not meant[1]:
        return f"positive_label is {settings.positive_label!r}, but {asked}"
    if not meant[0] and not settings.negative_label:
        return f"positive_label {settings.positive_label!r} means every label: {asked}"
    if not meant[0]:
        return f"negative_label is {settings.negative_label!r}, but {asked}"
    if settings.negative_label:
        return None
    if len(meant[0]) > 1:
        return f"more than one label is not {settings.positive_label!r}: {asked}"
    # Of the 1 and 2 of some data sets, say, 1 means negative
    upper, lower = ([_number(label[0]) for label in meant[y]] for y in (1, 0))
    if None not in (*upper, *lower) and max(upper) < min(lower):
        wanted = settings.positive_label
        return f"positive_label is {wanted!r}, the lower one, but {asked}"
    return None


def _listed(labels, counts):
    if len(labels) > MANY:
        ends = f"from {labels[0][-1]!r} to {labels[-1][-1]!r}"
        rows = sum(counts[label] for label in labels)
        return f"{len(labels):,} different labels {ends} ({rows:,} rows)"
    return ", ".join(f"{label[-1]!r} ({counts[label]:,} rows)" for label in labels)


def _example(labels):
    """Settings that might be meant: the upper labels against the lower ones."""
    if len(labels) > MANY:
        middle = labels[len(labels) // 2][-1]
        upper, lower = f">{middle}", f"<={middle}"
    else:
        half = len(labels) // 2
        upper = ",".join(str(label[-1]) for label in labels[-half:])
        lower = ",".join(str(label[-1]) for label in labels[:half])
    return f"positive_label='{upper}' and negative_label='{lower}'"


def _say(counts, meaning, left_out, settings):
    """One line each: what the labels mean if that is not plain, what is left out."""
    if not all(is_meant(label, str(y)) for label, y in meaning.items()):
        labels = sorted(counts, key=_order)
        positive, negative = (
            _listed([label for label in labels if meaning[label] == y], counts)
            for y in (1, 0)
        )
        print(f"labels: positive is {positive}, negative is {negative}")
    if left_out:
        listed = ", ".join(f"{n:,} {what}" for what, n in left_out.items())
        print(f"rows left out of {settings.dataset_name}: {listed}")


def keep_back(columns: dict[str, list], settings) -> dict[str, dict[str, list]]:
    """`train` and `validation` from one split: a share of it, the same every time.

    The share is taken of the different sentences of each label, so that no sentence
    is in both. Raises ValueError if a label has fewer than two.
    """
    label_of = {}
    for sentence, label in zip(columns["sentence"], columns["label"], strict=True):
        label_of.setdefault(sentence.strip(), label)
    rng, back = random.Random(0), set()  # not `seed`: all notebooks keep back the same
    for label, called in ((1, "positive"), (0, "negative")):
        sentences = [s for s, y in label_of.items() if y == label]
        if len(sentences) < 2:
            raise ValueError(
                f"data set {settings.dataset_name!r} has no split "
                f"{settings.validation_split!r}, and only {len(sentences)} different "
                f"{called} text(s), too few to keep some back; add some, or name a "
                "split with the setting validation_split"
            )
        rng.shuffle(sentences)
        back.update(
            sentences[: max(1, round(settings.validation_share * len(sentences)))]
        )
    parts = {name: {"sentence": [], "label": []} for name in ("train", "validation")}
    for sentence, label in zip(columns["sentence"], columns["label"], strict=True):
        part = parts["validation" if sentence.strip() in back else "train"]
        part["sentence"].append(sentence)
        part["label"].append(label)
    return parts


def drawn(columns: dict[str, list], settings) -> dict[str, list]:
    """`train_rows` rows by chance, in their order; fewer rows are among the more."""
    rows = list(range(len(columns["label"])))
    if settings.train_rows:
        random.Random(0).shuffle(rows)  # not `seed`, as in `keep_back`
        rows = sorted(rows[: settings.train_rows])
    return {name: [column[i] for i in rows] for name, column in columns.items()}


def check_both_labels(columns: dict[str, dict[str, list]], settings):
    """Raise ValueError unless each split holds both labels."""
    for name, rows in columns.items():
        if len(set(rows["label"])) == 2:
            continue
        split = getattr(settings, f"{name}_split")
        if not rows["label"]:
            raise ValueError(
                f"no row of split {split!r} of data set {settings.dataset_name!r} has "
                "a text and a label that the settings name; name another split with "
                f"{name}_split, or correct text_column and label_column"
            )
        kind = "positive" if 1 in rows["label"] else "negative"
        raise ValueError(
            f"all {len(rows['label'])} rows of split {split!r} of data set "
            f"{settings.dataset_name!r} are {kind}, so there is nothing to tell apart; "
            f"name another split with the setting {name}_split, or correct "
            "positive_label"
        )
