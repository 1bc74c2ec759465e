"""What one notebook hands to the next: models in folders, each there as a whole.

An artefact is written beside its place and then renamed, so that whoever is
interrupted leaves either the old one or the new one. With it go the settings that it
was made with, and it is taken up again only where they are still the same.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.processes import first_goes_first, state_if_divided
from utils.settings import PRESETS, as_written

STAGES = ("sft", "reward_model", "policy")  # in the order of the notebooks


def notebook_of(artefact: str) -> str:
    """The number of the notebook that makes an artefact."""
    return str(STAGES.index(artefact) + 1)


def set_aside(path: Path) -> Path:
    """Rename a file or folder that cannot be used, and give its new path."""
    asides = (path.with_name(f"{path.name}.aside-{i}") for i in itertools.count(1))
    return path.rename(next(aside for aside in asides if not aside.exists()))


def write_text(path: Path, text: str):
    """Write a file as a whole: whoever reads it finds the old text or the new one."""
    beside = Path(path).with_name(f"{Path(path).name}.unfinished")
    beside.write_text(text, encoding="utf8")
    os.replace(beside, path)


def _beside(folder: Path) -> tuple[Path, Path]:
    return tuple(folder.with_name(folder.name + x) for x in (".unfinished", ".old"))


def recover(folder: Path):
    """Undo a replacement that was interrupted between its two renamings."""
    _, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)


@contextlib.contextmanager
def replacing(folder: Path):
    """A new folder to write to; it takes the place of `folder` when all is written."""
    folder = Path(folder)
    recover(folder)
    unfinished, old = _beside(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_artefact(settings, name: str, model, tokenizer, metrics: dict) -> Path:
    """Write a model, its tokenizer, what was measured on it and the settings.

    `name` is one of STAGES. Gives the folder, in which `metrics.json` and
    `settings.json` stand beside the model.
    """
    folder = settings.folder / name
    weights = state_if_divided(model)
    with first_goes_first() as first:
        if first:
            _write(folder, settings, model, weights, tokenizer, metrics)
    return folder


def _write(folder, settings, model, weights, tokenizer, metrics):
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished, **weights)
        tokenizer.save_pretrained(unfinished)
        written = {"metrics": metrics, "settings": dataclasses.asdict(settings)}
        for file, content in written.items():
            text = json.dumps(content, indent=2) + "\n"
            (unfinished / f"{file}.json").write_text(text)


def find_artefacts(settings, *names: str) -> list[str]:
    """The folders of artefacts that other notebooks made with these settings.

    Raises FileNotFoundError, with both ways out, if one is not there; ValueError if
    one was made with other settings, which are named, or is damaged, after setting it
    aside.
    """
    with first_goes_first():  # it may rename what is unfinished or damaged
        return _find(settings, names)


def _find(settings, names):
    folders = {name: settings.folder / name for name in names}
    for folder in folders.values():
        recover(folder)
    if missing := [name for name, folder in folders.items() if not folder.exists()]:
        numbers = ",".join(map(notebook_of, missing))
        raise FileNotFoundError(
            f"{settings.folder} has no {' and no '.join(missing)}, which notebook "
            f"{numbers} makes. If you ran it on another Colab machine, set USE_DRIVE = "
            "True in the first cell of every notebook; or "
            + _command(settings, missing)
        )
    for name, folder in folders.items():
        _check_settings(settings, name, _read(settings, name, folder))
    return [str(folder) for folder in folders.values()]


def _command(settings, names) -> str:
    numbers = ",".join(map(notebook_of, names))
    preset = PRESETS[settings.preset]
    fields = ["runs_dir", *(f for name in names for f in settings.that_change(name))]
    changed = {
        field: getattr(settings, field)
        for field in fields
        if getattr(settings, field) != getattr(preset, field)
    }
    sets = [shlex.quote(f"{field}={value}") for field, value in changed.items()]
    return (
        "make it here, in a new cell: "
        f"!python -m utils --only {numbers} --preset {settings.preset}"
        + "".join(f" --set {one}" for one in sets)
    )


def _read(settings, name, folder) -> dict:
    """The settings that an artefact was made with, if all its files can be read."""
    try:
        if not (files := sorted(folder.glob("*.safetensors"))):
            raise ValueError("no weights")
        for file in files:
            with safe_open(file, "pt"):  # compares the file's size with its header
                pass
        made_with = json.loads((folder / "settings.json").read_text())
        json.loads((folder / "metrics.json").read_text())
        return as_written(dict(made_with))
    except (FileNotFoundError, ValueError, TypeError, SafetensorError) as error:
        aside = set_aside(folder)
        raise ValueError(
            f"{folder} is damaged ({error}) and was renamed to {aside.name}; "
            f"run notebook {notebook_of(name)} again, or {_command(settings, [name])}"
        ) from None


def _check_settings(settings, name, made_with):
    changed = {
        field: value
        for field, value in settings.that_change(name).items()
        if made_with.get(field) != value
    }
    if changed:
        listed = " and ".join(
            f"{field} {made_with.get(field)!r} instead of {value!r}"
            for field, value in changed.items()
        )
        back = {
            field: made_with[field]
            for field in changed
            if field != "preset" and field in made_with
        }
        raise ValueError(
            f"{settings.folder / name} was made with {listed}; run notebook "
            f"{notebook_of(name)} again"
            + (f", or add {back} to CHANGES in the first cell" if back else "")
        )
