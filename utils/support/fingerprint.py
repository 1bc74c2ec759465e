"""Fingerprints of what a run is made of: code that is running, weights, values."""

import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
import types

import torch
from torch import nn

PLAIN = int | float | str | bytes | bool | None | torch.dtype
LIBRARIES = tuple({sysconfig.get_path(x) for x in ("stdlib", "purelib", "platlib")})


def fingerprint(thing) -> str:
    """A few letters that change if the weights of a model, or values, do."""
    if isinstance(thing, nn.Module):
        # Whole numbers, whose sum does not depend on the order or the device
        bits = (p.view(torch.int32) for p in thing.parameters())
        thing = [int(x.sum(dtype=torch.int64)) for x in bits]
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


def fingerprints_of_code(*functions) -> dict[str, str]:
    """A fingerprint for each function that these call, directly or not, by its name.

    Followed are functions and classes that belong to no library, and the plain numbers
    and texts that they read. All is taken as it is in the memory of this process: what
    is on disk may have been edited since.
    """
    found, seen, queue = {}, set(), [(f.__name__, f) for f in functions]
    while queue:
        name, thing = queue.pop()
        thing = inspect.unwrap(thing) if callable(thing) else thing
        if isinstance(thing, functools.partial):
            values = (thing.func, *thing.args, *thing.keywords.values())
            queue += [(name, value) for value in values]
        elif isinstance(thing, tuple):
            queue += [(f"{name}[{i}]", value) for i, value in enumerate(thing)]
        elif isinstance(thing, PLAIN):
            found.setdefault(name, set()).add(repr(thing))
        elif isinstance(thing, types.FunctionType | type) and _is_ours(thing):
            of = _of_class if isinstance(thing, type) else _of
            said, uses = of(thing)
            found.setdefault(name, set()).add(said)
            queue += uses if id(thing) not in seen else []
            seen.add(id(thing))
    return {name: fingerprint(sorted(found[name])) for name in sorted(found)}


def _is_ours(thing) -> bool:
    """Whether it stands in a notebook, or in a file that belongs to no library."""
    if isinstance(thing, types.FunctionType):
        file = thing.__code__.co_filename
    else:
        module = sys.modules.get(getattr(thing, "__module__", thing.__name__), thing)
        file = getattr(module, "__file__", None) or ""
        if module.__name__ in sys.builtin_module_names:
            return False
    return not file.startswith((*LIBRARIES, "<frozen"))


def _of(function):
    """What a function does, and by name the things that it uses."""
    said, read, attributes = _of_code(function.__code__, function.__doc__)
    known = {name: x for name, x in function.__globals__.items() if name in read}
    defaults = (function.__defaults__ or (), *(function.__kwdefaults__ or {}).values())
    uses = [*known.items(), (f"default of {function.__name__}", defaults)]
    for module in known.values():  # of `ppo.policy_loss`, policy_loss
        if isinstance(module, types.ModuleType) and _is_ours(module):
            uses += [(n, getattr(module, n)) for n in attributes if hasattr(module, n)]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return said, uses + [(name, cell.cell_contents) for name, cell in cells]


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
    """The methods of a class, and what it inherits from."""
    said, uses = [], [(base.__name__, base) for base in kind.__bases__]
    for name, member in vars(kind).items():
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", member)  # of static and class methods
        if isinstance(member, types.FunctionType):
            text, more = _of(inspect.unwrap(member))
            said.append(name + text)
            uses += more
    return "".join(said), uses
