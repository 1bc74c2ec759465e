"""The state of a PPO run on disk, so that a run that was cut off can go on.

One file of safetensors holds all: the tensors as they are, everything else as JSON in
the file's header. Nothing in it is ever executed, as unpickling would.
"""

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

from utils.processes import (
    divided,
    divided_like,
    first_goes_first,
    this_process,
    whole,
)
from utils.settings import as_written
from utils.support.artefacts import set_aside
from utils.support.fingerprint import fingerprint, fingerprints_of_code
from utils.training import trunk_dtype

CHECKPOINT = "ppo.safetensors"  # in the folder of the preset
KIND = "state of a run of PPO"


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
            # Copies: what stays mapped to the file keeps Windows from replacing it
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if header.get("kind") != KIND:
        raise ValueError(f"it is no {KIND}")
    return json.loads(header["key"]), _unpack(json.loads(header["state"]), tensors)


def _state_of(part):
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, nn.Module):  # each weight once, also where two names share it
        return whole({k: p for k, p in part.named_parameters() if p.requires_grad})
    return part.state_dict() if hasattr(part, "state_dict") else part


@torch.no_grad()
def _put_back(run, name, state):
    part = getattr(run, name)
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, nn.Module):
        for key, parameter in part.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(divided_like(state[key], parameter))
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(state)
    else:
        setattr(run, name, state)


def _random_states() -> dict:
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_random_states(states):
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def _of_today(function):
    """The function that has this one's name now, in the place where it was defined."""
    place, name = getattr(function, "__globals__", {}), getattr(function, "__name__", 0)
    return place.get(name, function)


def _changes(then: dict, now: dict) -> str:
    """What is different between two keys, in words; empty if nothing is."""
    old, new = as_written(then["settings"]), now["settings"]
    changes = [
        f"{name} {old.get(name)!r} instead of {value!r}"
        for name, value in new.items()
        if old.get(name) != value
    ]
    old, new = then["made of"], now["made of"]
    edited = [name for name in new if name in old and new[name] != old[name]]
    # What is called no longer, or is called now, follows from an edit
    others = edited or sorted(new.keys() ^ old.keys())
    return ", ".join(changes + [f"another {name}" for name in others])


class Checkpoint:
    """Saves a PPO run every few rollouts, and goes on from there.

    `run` is an object whose attributes are all that training changes: `policy`, others
    with a state (optimiser, schedule, generator), and plain records, of which
    `history` has an entry for each rollout. What is frozen in the policy, the base of
    an adapter, is not saved. The run depends on `code`, functions that count with all
    that they call, and on `inputs`, by name: models, whose weights count, and plain
    values. A saved run is taken up only if these and the settings are the same, so that
    it never hides an edit.
    """

    def __init__(self, run, settings, code: tuple, inputs: dict):
        self.run, self.path = run, settings.folder / CHECKPOINT
        self.every, self.total = settings.checkpoint_every, settings.ppo_steps
        self.code, self.inputs, self.saved = code, inputs, 0
        device = next(run.policy.parameters()).device
        # A generator's state belongs to its device, a scaler's to its precision
        self.machine = {
            "device": device.type,
            "dtype": str(trunk_dtype(settings, device)),
        }
        self.key = self._key(settings)

    def _key(self, settings):
        code = fingerprints_of_code(*map(_of_today, self.code))
        inputs = {name: fingerprint(thing) for name, thing in self.inputs.items()}
        changing = settings.that_change("policy") | self.machine
        return {"settings": changing, "made of": code | inputs}

    def check(self, settings):
        """Raise RuntimeError if the settings, a model or a function are others now.

        Others than when this run began: it would go on with the new ones, and be saved
        as if it were all of a piece.
        """
        if changes := _changes(self.key, self._key(settings)):
            raise RuntimeError(
                f"this run of PPO began with {changes}; run the cell of the preflight, "
                "and then this one, to begin anew"
            )

    def restore(self):
        """Bring the run to where it was saved, and say so.

        Without a saved run of the same settings, models and code it stays as it is,
        and the reason is said. A file that cannot be used is renamed, not deleted.
        Raises OSError if the disk cannot be read at the moment; the file stays as it
        is then.
        """
        with first_goes_first():  # who may rename the file
            state = self._read()
        if state is None:
            return
        with divided(self.run.policy):
            for name, part in state["run"].items():
                _put_back(self.run, name, part)
        _set_random_states(state["random"])
        self.saved = done = len(state["run"]["history"])
        print(f"PPO goes on after {done} of {self.total} rollouts, from {self.path}")
        print("(to begin anew: checkpoint.discard(), then this cell again)")

    def _read(self):
        """The state of the saved run; None, and why, if PPO begins anew."""
        path = self.path
        if not path.exists():
            print(f"PPO begins, and is saved every {self.every} rollouts to {path}")
            return None
        try:
            key, state = read_state(path)
        except ValueError as error:
            name = set_aside(path).name
            print(f"PPO begins anew: {path} is damaged or another file ({error})")
            print(f"(it was renamed to {name})")
            return None
        done = len(state["run"]["history"])
        if changes := _changes(key, self.key):
            # A finished run has left its policy, of any other this is all there is
            then = key["settings"]
            finished = done == then["ppo_episodes"] // then["ppo_rollout_size"]
            kept = "" if finished else f"; renamed to {set_aside(path).name}"
            print(f"PPO begins anew: the run in {path} had {changes}{kept}")
            return None
        return state

    def save(self):
        """Save the run if it is time to: every few rollouts, and after the last.

        A disk that is full ends no training: it is a warning. Of several processes,
        which all have the same run, the first one saves it.
        """
        done = len(self.run.history)
        if done == self.saved or (done % self.every and done != self.total):
            return
        with divided(self.run.policy):
            parts = {name: _state_of(part) for name, part in vars(self.run).items()}
        if this_process():
            self.saved = done
            return
        state = {"run": parts, "random": _random_states()}
        try:
            write_state(self.path, self.key, state)
            self.saved = done
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{done} rollouts could not be saved to {self.path} ({error}); "
                "training goes on, make room for the next save",
                stacklevel=2,
            )

    def discard(self):
        """Delete the saved run."""
        self.path.unlink(missing_ok=True)
