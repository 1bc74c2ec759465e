"""`import tests.device.sham`: PyTorch gets the device `sham`, and the project uses it.

This comes before anything of the project, and before the first backward pass: autograd
counts the devices then, once. What the project asks of `cuda` it asks of `sham`, since
Python reads the files of the project with the one word in the place of the other. With
SHAM_AS=mps that goes for `mps`, too, and the device has no float64.
"""

import collections
import os
import re
import sys
import threading
import types
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
ROOMS = ("utils", "more", "practice", "workshop")
NO_FLOAT64 = os.environ.get("SHAM_AS") == "mps"


def build():
    """The compiled device; built (20 s of a processor) if its source has changed."""
    source = str(Path(__file__).with_name("sham.cpp"))
    return cpp_extension.load("sham", [source], extra_cflags=["-O0", "-g0"])


def renamed(text: str) -> str:
    """What the project says, with the device's name in the place of others."""
    return re.sub(r"\b(cuda|mps)\b" if NO_FLOAT64 else r"\bcuda\b", "sham", text)


def cell(lines: list[str]) -> list[str]:
    """A notebook's cell likewise; what lessons 4 to 9 train is short."""
    short = (re.sub(r"^(ROLLOUTS|BEST_OF_N) = .*", r"\1 = 2", x) for x in lines)
    return [*map(renamed, short)]


class Renamed(SourceFileLoader):
    """Reads a file of the project under the device's name; it stays as it is."""

    def get_code(self, fullname):
        text = Path(self.path).read_text("utf8")
        return compile(renamed(text), self.path, "exec", dont_inherit=True)


class Finder(PathFinder):
    """Finds the files of the project for `Renamed`."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ROOMS:
            spec = super().find_spec(name, path, target)
            if spec and isinstance(spec.loader, SourceFileLoader):
                spec.loader = Renamed(name, spec.origin)
            return spec


def place(frame) -> str | None:
    """The project's line at which a frame stands: file:line, or cell:line."""
    while frame:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/transformers/" in file:
            return "transformers"
        if "ipykernel_" in file or ".ipynb#" in file:
            return f"cell {file.rpartition('#')[2]}:{frame.f_lineno}"
        if file.startswith(str(ROOT)) and not file.startswith(str(ROOT / "tests")):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return None


waits = collections.Counter()  # by kind and place


def heard(what: str):
    """Count a wait where the project makes it, if it makes it."""
    # The main thread's line, for a backward pass has a thread of its own
    if where := place(sys._current_frames()[threading.main_thread().ident]):
        waits[what, where] += 1


def start():
    """Register the device, and let the project's files speak of it."""
    device = build()
    torch.utils.rename_privateuse1_backend("sham")
    module = types.ModuleType("torch.sham")  # what is asked of torch.cuda
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module._is_in_bad_fork = module.is_bf16_supported = lambda **_: False
    generator = device.default_generator()
    module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda _: generator.get_state()
    module.set_rng_state = lambda state, _: generator.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.max_memory_allocated = lambda *_: device.max_memory_allocated()
    module.empty_cache = lambda: None
    torch._register_device_module("sham", module)
    device.set_float64(not NO_FLOAT64)
    device.set_listener(heard)
    sys.meta_path.insert(0, Finder)
    return device


device = start()
