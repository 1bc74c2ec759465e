"""Anybody's labelled texts as sentences with the labels 1 (positive) and 0.

The settings say what columns, splits and labels are called. Whatever does not fit is
said in one sentence that names the setting for it. (This imports nothing of ours.)
"""

import glob
import operator
import re
from pathlib import Path

import datasets
import pandas

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
FORMATS |= {".parquet": "parquet"}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def read_splits(name: str, config: str = "") -> dict[str, datasets.Dataset]:
    """The splits of a data set, as they are.

    `name` is a name on the hub, a folder (of data files, or of `save_to_disk`) or a
    file: CSV, JSONL or Parquet, compressed or not. `config` says which one, where
    several data sets share a name. Raises what the library `datasets` raises.
    """
    path, ends, options = Path(name), [x.lower() for x in Path(name).suffixes], {}
    if kinds := [FORMATS[end] for end in ends if end in FORMATS]:
        if ".tsv" in ends:
            options = {"sep": "\t"}
        elif kinds == ["csv"] and ends[-1] == ".csv":  # not compressed
            head = path.read_text("utf8").partition("\n")[0]
            options = {"sep": max(",;\t", key=head.count)}
        files = {"train": glob.escape(name)}
        return datasets.load_dataset(kinds[-1], data_files=files, **options)
    if path.is_file():
        raise ValueError(f"its name ends in none of {', '.join(FORMATS)}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = datasets.load_from_disk(name)
        return found if isinstance(found, dict) else {"train": found}
    if path.is_dir() and name != glob.escape(name):
        raise ValueError("its path holds [, * or ?, which is a pattern; rename it")
    return datasets.load_dataset(name, config or None)


def as_reviews(found: dict, settings) -> datasets.DatasetDict:
    """The splits `train` and `validation`, with the columns `sentence` and `label`.

    A label is 1 (positive) or 0 (negative). Rows without a text, or with a label that
    the settings do not name, are left out. Without a validation split, a tenth of the
    sentences of train is kept back. Of what is left, `train_rows` are drawn, the same
    for every seed. Raises ValueError, naming the setting, if anything does not fit.
    """
    wanted = settings.validation_split
    named = f"data set {settings.dataset_name!r}"
    if "train" not in found or wanted not in {"validation", *found} - {"train"}:
        said = f"{named} has the splits {list(found)}, and no 'train' or no {wanted!r}"
        raise ValueError(f"{said}; correct validation_split, or name other data")
    splits = {"train": "train", "validation": wanted}
    parts = {k: labelled(found[v], settings) for k, v in splits.items() if v in found}
    rows = pandas.concat(parts, names=["split"])
    yes, no = is_meant(rows.label, settings.positive_label), rows.label.notna()
    negative = settings.negative_label
    no &= is_meant(rows.label, negative) if negative else ~yes
    clear = yes.any() and no.any() and not (yes & no).any()
    if clear and not negative:  # all others are: only one label, and no higher number
        number = pandas.to_numeric(rows.label, errors="coerce")
        clear = (
            rows.label[no].nunique() == 1 and not number[yes].max() < number[no].max()
        )
    if not clear:
        raise ValueError(
            f"column {settings.label_column!r} of {named} holds the labels "
            f"{rows.label.value_counts().head(20).to_dict()}; positive_label "
            f"{settings.positive_label!r} and negative_label {negative!r} do not tell "
            "them apart: set both, such as '4,5' and '1,2', or '>3' and '<3', or name "
            "another label_column"
        )
    kept = (yes | no) & (rows.sentence.str.strip() != "")
    if not kept.all():
        print(f"{(~kept).sum():,} rows without a text or a label are left out")
    rows = rows.assign(label=yes.astype(int))[kept]
    train, validation = (rows.query(f"split == {part!r}") for part in splits)
    if "validation" not in parts:
        texts = train.sentence.str.strip()
        different = texts[~texts.duplicated()].groupby(train.label)
        back = texts.isin(different.sample(frac=0.1, random_state=0))
        train, validation = train[~back], train[back]
        print(f"no split {wanted!r}: {len(validation):,} rows of train are kept back")
    if 0 < settings.train_rows < len(train):
        train = train.sample(settings.train_rows, random_state=0).sort_index()
    result = datasets.DatasetDict()
    for part, some in (("train", train), ("validation", validation)):
        if some.label.nunique() < 2:
            said = f"the {len(some)} rows of {part} in {named} have not both labels"
            raise ValueError(f"{said}; take others, or correct positive_label")
        result[part] = datasets.Dataset.from_pandas(some, preserve_index=False)
    return result


def labelled(rows: datasets.Dataset, settings) -> pandas.DataFrame:
    """The columns `sentence` and `label` as they are, None where there is no label.

    Raises ValueError if there are no such columns, or no texts and labels in them.
    """
    columns = []
    for field, kind in (("text_column", str), ("label_column", str | int | float)):
        name = getattr(settings, field)
        values = rows[name][:] if name in rows.column_names else [...]
        if odd := [x for x in values if not isinstance(x, kind | None)]:
            held = "is not there" if odd[0] is ... else f"holds {repr(odd[0])[:60]}"
            raise ValueError(
                f"column {name!r} of data set {settings.dataset_name!r} {held}; name "
                f"one of {str(rows.column_names)[:300]} with the setting {field}"
            )
        columns.append([None if str(x).strip() == "" else x for x in values])
    texts, labels = columns
    if names := getattr(rows.features[settings.label_column], "names", None):
        # Of a class either the name counts (stars have numbers for names) or the number
        by_number = re.fullmatch(r"[-\d.,<>= ]+", settings.positive_label)
        by_number = by_number and not names[0].isdecimal()
        known = dict(enumerate(range(len(names)) if by_number else names))
        labels = [known.get(label) for label in labels]
    return pandas.DataFrame({"sentence": [x or "" for x in texts], "label": labels})


def is_meant(labels: pandas.Series, wanted: str) -> pandas.Series:
    """Which labels are what a setting says.

    It says one label or several between commas, as text or as numbers (1 is 1.0 and
    True), or a bound such as >3 or <=0.5.
    """
    number = pandas.to_numeric(labels, errors="coerce")
    if bound := re.fullmatch(r"\s*([<>]=?)\s*([-\d.]+)\s*", wanted):
        return COMPARE[bound[1]](number, float(bound[2]))
    words = [word.strip().casefold() for word in (wanted, *wanted.split(","))]
    numbers = pandas.to_numeric(pandas.Series(words), errors="coerce").dropna()
    texts = labels.astype(str).str.strip().str.casefold()
    return (texts.isin(words) | number.isin(numbers)) & labels.notna()
