"""A run of the series: how it begins, what it saves, and when that is used again.

A model is written beside its place and then renamed, so that an interrupt leaves the
old one or the new one. It is used only with the settings that it was made with; the
state of PPO also only by the code that it was made with.
"""

import dis
import functools
import hashlib
import inspect
import json
import linecache
import os
import re
import shlex
import shutil
import tempfile
import textwrap
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from IPython import get_ipython
from IPython.display import Markdown
from torch import nn

from practice import tiny_world
from utils import check_code_is_current
from utils.data import innermost, load_tokenizer, loading, tokens_in_front
from utils.settings import ROOT, STAGES, Settings, load_settings
from utils.training import get_device, trunk_dtype

FILES = ("ppo", "models", "rollout", "training")  # that the loop of PPO reaches
# Other bytes each time that the same content is saved
DATED = ("state.json", "dataset_info.json", "metrics.json", "settings.json")
TO_LOWER = dict.fromkeys(STAGES[:2], "batch_size or max_tokens")
TO_LOWER["policy"] = "ppo_micro_batch_size, ppo_minibatch_size or ppo_rollout_size"


def prepare(artefact: str, preset: str = "", changes=(), use_drive: bool = False):
    """The settings and the device for making an artefact, after a look at the machine.

    Without a preset it is RLHF_PRESET's, or `full` where there is a GPU and `tiny`
    elsewhere; `changes` are settings by name. The tiny world is built if it is used.
    From now on errors of `utils` end a cell in one sentence, and no library draws a
    widget. Raises, before anything is trained, ValueError for settings or a model that
    do not fit, OSError for what cannot be loaded or written, RuntimeError for an edited
    file of `utils`.
    """
    say_errors_in_a_sentence(artefact)
    check_code_is_current()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
    changes, gpu = dict(changes), torch.cuda.is_available()
    if use_drive:
        from google.colab import drive

        drive.mount("/content/drive")
        changes["runs_dir"] = "/content/drive/MyDrive/rlhf/runs"
    preset = preset or os.environ.get("RLHF_PRESET") or ("full" if gpu else "tiny")
    settings = load_settings(preset, changes)
    if tiny_world.world_of(settings.model_name) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on a model this small, more only wait for each other
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.folder).close()
    except OSError as error:
        said = f"cannot write into {settings.folder} ({innermost(error)})"
        raise OSError(f"{said}; set runs_dir to a folder of yours") from error
    tiny_world.prepare(settings)
    name, device = settings.model_name, get_device(settings)
    with loading("model", name):
        config = transformers.AutoConfig.from_pretrained(name).get_text_config()
    tokenizer, longest = load_tokenizer(name), settings.max_tokens
    response = settings.prompt_max_tokens + settings.max_new_tokens
    longest = max(longest, len(tokens_in_front(tokenizer)) + response)
    reads = getattr(config, "max_position_embeddings", None) or longest
    if longest > reads or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{name!r} reads {reads} tokens of {config.vocab_size} words, but a text "
            f"has up to {longest}, or its tokenizer {len(tokenizer)}; lower max_tokens "
            "or max_new_tokens, or take the tokenizer that belongs to it"
        )
    precision = str(trunk_dtype(settings, device)).removeprefix("torch.")
    print(f"preset: {preset}, on {device} in {precision}")
    print(f"model: {name}, data set: {settings.dataset_name}")
    if settings.changes:
        print(f"changed: {settings.changes}")
    if device.type == "cpu":
        print("(GPT-2 on SST-2 takes a GPU. Colab: Runtime > Change runtime type > T4)")
    return settings, device


def say_errors_in_a_sentence(artefact: str):
    """Let errors that are meant for people end a cell in one line.

    Those are the errors that this project raises, but for its formulas; an interrupt;
    and a full GPU, where what the failed cell held is freed. Others keep their
    traceback.
    """

    def show(shell, kind, error, trace, tb_offset=None):
        *_, (frame, line) = traceback.walk_tb(trace)
        file, said = Path(frame.f_code.co_filename), str(error) or "run the cell again"
        meant = file.parent in [ROOT / room for room in ("utils", "practice", "more")]
        meant &= file.name != "ppo.py"
        meant &= linecache.getline(str(file), line).strip().startswith("raise ")
        full = re.search("out of memory|ALLOC_FAILED", said)  # the second is cuBLAS's
        if isinstance(error, RuntimeError) and full:
            traceback.clear_frames(trace)  # they hold the tensors
            torch.cuda.empty_cache()
            said = f"{said[:200]}; lower {TO_LOWER[artefact]} in CHANGES, or end the "
            said, meant = f"{said}kernels that hold the rest of the GPU", True
        if meant or kind is KeyboardInterrupt:
            error._render_traceback_ = lambda: [f"{kind.__name__}: {said}"]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    if shell := get_ipython():
        shell.set_custom_exc((KeyboardInterrupt, Exception), show)


def check_all(checks, failure: str, anyway: bool = False):
    """Print each pair of (sentence, truth); raise RuntimeError if one is not true.

    The error begins with `failure`. With `anyway` nothing is raised.
    """
    print("\n".join(f"{'✓' if good else '✗'} {sentence}" for sentence, good in checks))
    wrong = [sentence for sentence, good in checks if not good]
    if wrong and not anyway:
        raise RuntimeError(f"{failure}; not true: {'; '.join(wrong)}")


def show_source(*things) -> Markdown:
    """The source of functions or classes, for display in a notebook."""
    check_code_is_current()
    sources = [textwrap.dedent(inspect.getsource(thing)) for thing in things]
    return Markdown("```python\n" + "\n\n".join(sources) + "```")


def ingredients(settings, artefact: str) -> str:
    """A hash of the files that an artefact is made of: one's own data, and models."""
    places, files = [Path(settings.model_name), Path(settings.dataset_name)], []
    if artefact == "policy":
        places += [settings.folder / name for name in STAGES[:2]]
    for place in places:
        files += sorted(place.rglob("*.*")) if place.is_dir() else [place]
    contents = [x.read_bytes() for x in files if x.is_file() and x.name not in DATED]
    return fingerprint([hashlib.sha256(x).hexdigest() for x in contents])


def save_artefact(settings, name: str, model, tokenizer, metrics: dict) -> Path:
    """Write a model, its tokenizer, what was measured on it and the settings.

    `name` is one of STAGES, or another. Gives the folder, in which `metrics.json` and
    `settings.json` stand beside the model. Raises OSError if it cannot be written.
    """
    folder = settings.folder / name
    unfinished, old = (folder.with_name(f".{name}.{x}") for x in ("new", "old"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        made_with = asdict(settings) | {"ingredients": ingredients(settings, name)}
        for file, content in (("metrics", metrics), ("settings", made_with)):
            text = json.dumps(content, indent=2) + "\n"
            (unfinished / f"{file}.json").write_text(text)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        said = f"cannot save {folder} ({innermost(error)})"
        raise OSError(f"{said}; make room there, and run this cell again") from error
    for file in unfinished.iterdir():  # safetensors makes its files the owner's alone
        file.chmod((unfinished / "settings.json").stat().st_mode)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def find_artefacts(settings, *names: str) -> list[str]:
    """The folders of artefacts that other notebooks made with these settings.

    Raises FileNotFoundError, with both ways out, if one is not there; ValueError if one
    was made with other settings, which are named, or of other data or models; OSError
    if it cannot be read.
    """
    folders = [settings.folder / name for name in names]
    for name, folder in zip(names, folders, strict=True):
        number, old = STAGES.index(name) + 1, folder.with_name(f".{name}.old")
        if old.exists() and not folder.exists():  # an interrupt came between renamings
            old.rename(folder)
        if not folder.exists():
            sets = [shlex.quote(f"{k}={v!r}") for k, v in settings.changes.items()]
            command = f"!python -m utils --only {number} --preset {settings.preset}"
            raise FileNotFoundError(
                f"{folder} is not there: run notebook {number} (on Colab with "
                "USE_DRIVE = True in every first cell); or make it here, in a new cell "
                f"{' --set '.join([command, *sets])}"
            )
        with loading("model", folder):
            made_with = json.loads((folder / "settings.json").read_text())
            known = {k: x for k, x in made_with.items() if k in vars(settings)}
            then = Settings(**known).that_change(name)
        now = settings.that_change(name)
        if other := {k: then[k] for k in now if then[k] != now[k]}:
            raise ValueError(
                f"{folder} was made with {other}; run notebook {number} again, or add "
                "these settings to CHANGES in the first cell"
            )
        now = ingredients(settings, name)
        if made_with.get("ingredients", now) != now:
            raise ValueError(
                f"{folder} was made from other data, or from models that were made "
                f"anew since; run notebook {number} again"
            )
    return [str(folder) for folder in folders]


def fingerprint(thing) -> str:
    """A short hash of a value, or of all weights of a model."""
    digest = hashlib.sha256()
    for value in thing.parameters() if isinstance(thing, nn.Module) else [repr(thing)]:
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            value = flat.view(torch.uint8).numpy()
        digest.update(value.encode() if isinstance(value, str) else value)
    return digest.hexdigest()[:16]


def globals_of(code) -> set[str]:
    """The names of the global values that a function's code reads."""
    read = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
    return read.union(*(globals_of(x) for x in code.co_consts if inspect.iscode(x)))


def code_hash(*functions) -> str:
    """One hash over the code that PPO depends on.

    It covers FILES, and what these functions read: of a notebook's functions the source
    and the plain values, of this project's other functions the whole file. A notebook's
    function is looked up by its name, since its cell may have been run again.
    """
    files, sources, seen = {ROOT / "utils" / f"{x}.py" for x in FILES}, set(), set()
    queue = [(getattr(f, "__name__", ""), f) for f in functions]
    queue = [(name, getattr(f, "__globals__", {}).get(name, f)) for name, f in queue]
    while queue:
        name, thing = queue.pop()
        if isinstance(thing, set | frozenset):
            thing = sorted(map(repr, thing))  # in which order they come is chance
        if isinstance(thing, torch.Tensor):
            thing = thing.tolist()
        if isinstance(thing, bool | int | float | str | tuple | list | dict):
            sources.add(f"{name} = {thing!r}")
        elif isinstance(thing, functools.partial):
            parts = [thing.func, *thing.args, *thing.keywords.values()]
            sources.add(" ".join(getattr(part, "__name__", "") for part in parts))
            queue += enumerate(parts)
        elif callable(thing) and (thing := inspect.unwrap(thing)) not in seen:
            seen.add(thing)
            file = getattr(getattr(thing, "__code__", None), "co_filename", "/")
            if isinstance(thing, type) and thing.__module__ == "__main__":
                queue += [(k, x) for k, x in vars(thing).items() if callable(x)]
            elif Path(file).is_relative_to(ROOT) and "site-packages" not in file:
                files.add(Path(file))
            elif re.search(r"ipykernel|ipython-input|\.ipynb#", file):  # a cell
                sources.add(textwrap.dedent(inspect.getsource(thing)))
                read = inspect.getclosurevars(thing).nonlocals
                names = globals_of(thing.__code__) & thing.__globals__.keys()
                read |= {name: thing.__globals__[name] for name in names}
                queue += [*read.items(), *enumerate(thing.__defaults__ or ())]
    return fingerprint([file.read_text() for file in sorted(files)] + sorted(sources))


class Checkpoint:
    """Saves a PPO run every few rollouts, and goes on from there.

    `run` is an object whose attributes are all that training changes: a model, whose
    frozen weights are not saved; others with a state (optimiser, schedule, generator);
    and plain records, of which `history` has an entry for each rollout. The run depends
    on `code`, functions, and on `inputs`, models and plain values. A saved run is used
    only if these and the settings are the same, so that it never hides an edit.
    """

    def __init__(self, run, settings, code: tuple, inputs: tuple, every: int = 8):
        self.run, self.path = run, settings.folder / "ppo.pt"
        self.every, self.total, self.saved = every, settings.ppo_steps, 0
        self.code, self.inputs = code, inputs
        self.key = self._key(settings)

    def _key(self, settings) -> dict:
        device = self.run.generator.device
        # The generator's state belongs to its device, the scaler's to its precision
        device = f"{device.type} in {trunk_dtype(settings, device)}"
        made_of = {"code": code_hash(*self.code), "device": device}
        made_of["model or prompts"] = " ".join(map(fingerprint, self.inputs))
        return settings.that_change("policy") | made_of

    def check(self, settings, to_the_end: bool = False):
        """Raise RuntimeError if settings, models or code changed since the start.

        With `to_the_end` also if the run has been cut off.
        """
        check_code_is_current()
        now = self._key(settings)
        if changed := [name for name in now if now[name] != self.key[name]]:
            raise RuntimeError(
                f"this run of PPO began with other {' and '.join(changed)}; to begin "
                "anew, run on from the preflight"
            )
        if to_the_end and (done := len(self.run.history)) < self.total:
            said = f"this run of PPO was cut off after {done} of {self.total} rollouts"
            raise RuntimeError(f"{said}; run the cell of its loop again, and then this")

    def restore(self):
        """Bring the run to where it was saved, and say so; else say why it begins anew.

        Raises OSError if the file cannot be read; it stays as it is.
        """
        place, aside = self.path, self.path.with_suffix(".aside.pt")
        if not place.exists():
            print(f"PPO begins, and is saved every {self.every} rollouts to {place}")
            return
        try:  # nothing in the file is executed
            state = torch.load(place, map_location="cpu", weights_only=True)
            then = state.pop("key")
        except Exception as error:
            said = f"cannot read {place} ({innermost(error)}); try again, or delete it "
            raise OSError(f"{said}if it is damaged: PPO then begins anew") from error
        if changed := [name for name in self.key if self.key[name] != then.get(name)]:
            os.replace(place, aside)
            print(f"PPO begins anew: {place} had other {' and '.join(changed)}")
            print(f"(it is {aside.name} now)")
            return
        for name, saved in state.items():
            part = getattr(self.run, name)
            if isinstance(part, nn.Module):
                part.load_state_dict(saved, strict=False)
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(saved)
            elif isinstance(part, torch.Generator):
                part.set_state(saved)
            else:
                setattr(self.run, name, saved)
        self.saved = len(self.run.history)
        print(f"PPO goes on after {self.saved} of {self.total} rollouts, from {place}")
        print("(to begin anew: checkpoint.discard(), then run on from the preflight)")

    def save(self):
        """Save the run if it is time to: every few rollouts, and after the last.

        A disk that is full ends no training: it is a warning.
        """
        done, state = len(self.run.history), {"key": self.key}
        if done == self.saved or (done % self.every and done != self.total):
            return
        for name, part in vars(self.run).items():
            if isinstance(part, nn.Module):
                weights = part.named_parameters()  # each once, under its first name
                part = {k: p.detach() for k, p in weights if p.requires_grad}
            elif isinstance(part, torch.Generator):
                part = part.get_state()
            state[name] = part.state_dict() if hasattr(part, "state_dict") else part
        beside = self.path.with_suffix(".unfinished.pt")
        try:
            torch.save(state, beside)
            os.replace(beside, self.path)
            self.saved = done
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            said = f"{self.path} could not be saved ({innermost(error)}); make room"
            warnings.warn(said, stacklevel=2)

    def discard(self):
        """Delete the saved run."""
        self.path.unlink(missing_ok=True)
