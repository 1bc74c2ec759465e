"""Fingerprints of what a run is made of: code that is running, weights, values."""

import dis
import functools
import hashlib
import sysconfig
import types
from pathlib import Path

import torch
from torch import Tensor, nn

PLAIN = int | float | str | bytes | bool | None | torch.dtype
STDLIB = Path(sysconfig.get_path("stdlib"))


def fingerprint(thing) -> str:
    """A few letters that change if a value does, or a weight of a model."""
    digest = hashlib.sha256()
    for value in thing.parameters() if isinstance(thing, nn.Module) else [thing]:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def fingerprints_of_code(*functions) -> dict[str, str]:
    """A fingerprint for each function that these call, directly or not, by its name.

    Followed are functions, methods and classes that belong to no library, and the
    plain values, tensors, lists and dicts that they read; not what they import inside
    of themselves. All is taken as it is in the memory of this process: what is on disk
    may have been edited since.
    """
    found, seen = {}, set()
    queue = [(getattr(f, "__name__", type(f).__name__), f) for f in functions]
    while queue:
        name, thing = queue.pop()
        if isinstance(thing, functools.partial | types.MethodType):
            said, uses = "", [getattr(thing, "func", getattr(thing, "__func__", None))]
            uses += [getattr(thing, "args", ()), getattr(thing, "keywords", {})]
            uses = [(name, value) for value in uses]
        elif isinstance(thing, PLAIN | tuple | list | dict):
            said, others = _text(thing)
            uses = [(name, other) for other in others]
        elif isinstance(thing, Tensor):
            said, uses = fingerprint(thing), []
        elif isinstance(thing, types.FunctionType):
            said, uses = _of(thing)
        elif isinstance(thing, type):
            said, uses = _of_class(thing)
        elif callable(thing) and not isinstance(thing, nn.Module):
            said, uses = "", [(name, type(thing))]
        else:
            continue
        if said:
            found.setdefault(name, set()).add(said)
        queue += uses if id(thing) not in seen else []
        seen.add(id(thing))
    return {name: fingerprint(sorted(found[name])) for name in sorted(found)}


def _text(thing):
    """The plain values in a container, as text, and what else lies in it."""
    if isinstance(thing, PLAIN):
        return repr(thing), []
    if isinstance(thing, dict):
        thing = list(thing.items())
    if not isinstance(thing, tuple | list):
        return type(thing).__name__, [thing]
    parts = [_text(value) for value in thing]
    return f"[{', '.join(t for t, _ in parts)}]", [x for _, more in parts for x in more]


def _is_ours(file: str) -> bool:
    """Whether this is a notebook, or a file that belongs to no library."""
    if file.startswith("<frozen"):
        return False
    path = Path(file)
    libraries = {"site-packages", "dist-packages"} & set(path.parts)
    return not libraries and not path.is_relative_to(STDLIB)


def _of(function):
    """What a function does, and by name the things that it uses."""
    said, uses = "", []
    if inner := getattr(function, "__wrapped__", None):  # it is a decorator's
        said = f"inside of {function.__code__.co_name}"
        uses.append((getattr(inner, "__name__", function.__name__), inner))
    if not _is_ours(function.__code__.co_filename):
        return said, uses
    code, read, attributes = _of_code(function.__code__, function.__doc__)
    defaults = (function.__defaults__ or (), function.__kwdefaults__ or {})
    text, others = _text(defaults)
    known = {name: x for name, x in function.__globals__.items() if name in read}
    uses += [*known.items(), *((function.__name__, other) for other in others)]
    for module in known.values():  # of `ppo.policy_loss`, policy_loss
        file = getattr(module, "__file__", None) or "<frozen"
        if isinstance(module, types.ModuleType) and _is_ours(file):
            uses += [(n, getattr(module, n)) for n in attributes if hasattr(module, n)]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        if cell != EMPTY and name != "__class__":
            uses.append((name, cell.cell_contents))
    return said + code + text, uses


EMPTY = types.CellType()


def _of_code(code, doc=None):
    """Instructions and constants as text, without line numbers; the names it reads."""
    said = [code.co_code.hex(), repr(code.co_names + code.co_varnames)]
    read, attributes = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, more, further = _of_code(constant)
            said.append(inner)
            read, attributes = read | more, attributes | further
        elif isinstance(constant, frozenset):  # printed in another order next time
            said.append(repr(sorted(map(repr, constant))))
        elif constant is None or constant != doc:  # what it says of itself may change
            said.append(repr(constant))
    return "".join(said), read, attributes


def _of_class(kind):
    """The methods and plain values of a class, and what it inherits from."""
    said, uses = [], [(base.__name__, base) for base in kind.__bases__]
    functions = [x for x in vars(kind).values() if isinstance(x, types.FunctionType)]
    if not any(_is_ours(f.__code__.co_filename) for f in functions):
        return "", []
    for name, member in vars(kind).items():
        for inside in ("fget", "func", "__func__"):  # of a property, a static method
            member = getattr(member, inside, member)
        if isinstance(member, types.FunctionType):
            text, more = _of(member)
            said.append(name + text)
            uses += more
        elif isinstance(member, PLAIN) and not name.startswith("__"):
            said.append(f"{name} {member!r}")
    return "".join(said), uses
