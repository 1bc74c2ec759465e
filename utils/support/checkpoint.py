"""The state of a PPO run on disk, so that a run that was cut off can go on.

One file of safetensors holds all: the tensors as they are, everything else as JSON in
the file's header. Nothing in it is ever executed, as unpickling would.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.settings import trunk_dtype
from utils.support.artefacts import set_aside

CHECKPOINT = "ppo.safetensors"  # in the folder of the preset
KIND = "state of a PPO run"
# Settings that leave the run as it is
FREE = ("runs_dir", "checkpoint_every", "frontier_rollouts", "best_of_n")
# And that changes no more than its rounding, so that a full GPU need not begin anew
FREE += ("ppo_micro_batch_size",)
READ_BY_LEARNERS = Path(__file__).parents[1]  # utils/*.py


def _pack(value, tensors, name="state"):
    """What JSON can hold of a nest of dicts and lists; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        while name in tensors:  # 1 and "1" are two keys, but one name
            name += "'"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON knows no keys but strings
        pairs = [[k, _pack(v, tensors, f"{name}.{k}")] for k, v in value.items()]
        return {"pairs": pairs}
    if isinstance(value, list | tuple):
        return [_pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
    return value


def _unpack(value, tensors):
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {k: _unpack(v, tensors) for k, v in value["pairs"]}
    return value


def write_state(path: Path, key: dict, state: dict):
    """Write a nest of dicts, lists, tensors and plain values, or leave the old file.

    `key` says in plain values what run it belongs to. Tuples come back as lists.
    """
    tensors = {}
    packed = _pack(state, tensors)
    header = {"kind": KIND, "key": json.dumps(key), "state": json.dumps(packed)}
    # A folder, since safetensors may leave a file of its own there when it is killed
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / path.name, metadata=header)
    os.replace(unfinished / path.name, path)
    shutil.rmtree(unfinished, ignore_errors=True)


def read_state(path: Path) -> tuple[dict, dict]:
    """The key and the state of a file of `write_state`.

    Raises ValueError if it is cut off, or another file, and OSError if it cannot be
    read at all.
    """
    try:
        with safe_open(path, "pt") as file:  # compares the size with the header
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if header.get("kind") != KIND:
        raise ValueError(f"it is no {KIND}")
    return json.loads(header["key"]), _unpack(json.loads(header["state"]), tensors)


def _fingerprint(thing) -> str:
    """A few letters that change if the code, the weights or the values do."""
    if isinstance(thing, nn.Module):
        # Whole numbers, whose sum does not depend on the order or the device
        bits = (p.view(torch.int32) for p in thing.parameters())
        thing = [int(x.sum(dtype=torch.int64)) for x in bits]
    elif callable(thing):
        thing = inspect.getsource(thing)
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


def _state_of(part):
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, nn.Module):  # each weight once, also where two names share it
        return dict(part.named_parameters())
    return part.state_dict()


@torch.no_grad()
def _put_back(part, state):
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, nn.Module):
        for name, parameter in part.named_parameters():
            parameter.copy_(state[name])
    else:
        part.load_state_dict(state)


def _random_states() -> dict:
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states):
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


class Checkpoint:
    """Saves a PPO run every few rollouts, and goes on from there.

    `parts` are the objects that training changes (policy, optimizer, schedule, scaler,
    generator), by name. The run depends on `code`, functions whose source counts, and
    on `inputs`, by name: models, whose weights count, and plain values. A saved run is
    taken up only if these are the same, and all settings and the files `utils/*.py`,
    so that it never hides an edit.
    """

    def __init__(self, settings, device, parts: dict, code: tuple, inputs: dict):
        self.path = settings.folder / CHECKPOINT
        self.every, self.total = settings.checkpoint_every, settings.ppo_steps
        self.parts = parts
        sources = sorted(READ_BY_LEARNERS.glob("*.py"))
        made_of = {f"utils/{file.name}": file.read_text("utf8") for file in sources}
        made_of |= {function.__name__: function for function in code} | inputs
        self.key = {
            "settings": {
                **{
                    k: v
                    for k, v in dataclasses.asdict(settings).items()
                    if k not in FREE
                },
                # A generator's state belongs to its device, a scaler's to its precision
                "device": device.type,
                "dtype": str(trunk_dtype(settings, device)),
            },
            "made of": {name: _fingerprint(thing) for name, thing in made_of.items()},
        }

    def restore(self, history: list, *records) -> list:
        """Put all parts back as they were saved, and give the records saved with them.

        Without a saved run of the same settings, models and code, the parts stay as
        they are and the given records come back. Says which of the two it is. A file
        that cannot be used is renamed, not deleted. Raises OSError if the disk cannot
        be read at the moment; the file stays as it is then.
        """
        fresh, path = [history, *records], self.path
        if not path.exists():
            print(f"PPO begins, and is saved every {self.every} rollouts to {path}")
            return fresh
        try:
            key, state = read_state(path)
        except ValueError as error:
            name = set_aside(path).name
            print(f"PPO begins anew: {path} is damaged or another file ({error})")
            print(f"(it was renamed to {name})")
            return fresh
        done = len(state["records"][0])
        if changes := self._changes(key):
            # A finished run has left its policy, of any other this is all there is
            kept = "" if done == self.total else f"; renamed to {set_aside(path).name}"
            print(f"PPO begins anew: the run in {path} had {changes}{kept}")
            return fresh
        for name, part in self.parts.items():
            _put_back(part, state["parts"][name])
        _set_random_states(state["random"])
        print(f"PPO goes on after {done} of {self.total} rollouts, from {path}")
        print("(to begin anew: checkpoint.discard(), then this cell again)")
        return state["records"]

    def _changes(self, key) -> str:
        changes = [
            f"{name} {key['settings'].get(name)!r} instead of {value!r}"
            for name, value in self.key["settings"].items()
            if key["settings"].get(name) != value
        ]
        changes += [
            f"another {name}"
            for name, fingerprint in self.key["made of"].items()
            if key["made of"].get(name) != fingerprint
        ]
        return ", ".join(changes)

    def save(self, history: list, *records):
        """Save the run if it is time to: every few rollouts, and after the last.

        A disk that is full ends no training: it is a warning.
        """
        if len(history) % self.every and len(history) != self.total:
            return
        parts = {name: _state_of(part) for name, part in self.parts.items()}
        records = [history, *records]
        state = {"parts": parts, "records": records, "random": _random_states()}
        try:
            write_state(self.path, self.key, state)
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{len(history)} rollouts could not be saved to {self.path} ({error}); "
                "training goes on, make room for the next save",
                stacklevel=2,
            )

    def discard(self):
        """Delete the saved run."""
        self.path.unlink(missing_ok=True)
