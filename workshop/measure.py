"""What lessons and pages quote over several seeds: `python -m workshop.measure NAME`.

A measurement is a function that asks for runs of several *ways*, each with several
seeds, and returns what its JSON file is to hold. How the runs are made is the same for
all, and stands here: each is a process of its own; the ways take turns, so that a
machine that slows down slows all of them; what was found is kept in
`runs/measured/NAME`, and the same command goes on where it stopped. After an edit of
the code or the models that the figures come from, all begins anew.
"""

import argparse
import io
import json
import multiprocessing
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import nbformat
import torch
import transformers
from tqdm import tqdm

from more.common import write_text
from more.launch import cores
from utils.__main__ import parse
from utils.runs import find_artefacts, fingerprint
from utils.settings import NOTEBOOKS, ROOT, Settings
from workshop import series, speed, tiny


class Measurement(NamedTuple):
    """What can be measured: by what, on what, and where the figures go."""

    function: Callable
    output: str  # in the repository
    lessons: str  # whose code it runs; beyond 3 they begin with the models of runs/tiny
    seeds: int = 3
    preset: str = "tiny"
    changes: tuple[str, ...] = ()  # FIELD=VALUE


KNOWN = {
    "expected": Measurement(series.expected, "utils/expected.json", "123", 10),
    "race": Measurement(tiny.race, "docs/race.json", "35", 5),
    "preferences": Measurement(tiny.preferences, "docs/preferences.json", "356"),
    "frontier": Measurement(tiny.frontier, "docs/frontier.json", "3567"),
    "equal_kl": Measurement(
        tiny.equal_kl, "docs/equal-kl.json", "367", 1, "full", ("eval_prompts=64",)
    ),
    "noise": Measurement(tiny.noise, "docs/noise.json", "35"),
    "real_noise": Measurement(
        tiny.noise, "docs/real-noise.json", "35", 1, "full", ("eval_prompts=38",)
    ),
    "adapters": Measurement(tiny.adapters, "docs/adapters.json", "38"),
    "real_run": Measurement(
        series.real_run, "docs/real-run/results.json", "123", 3, "full"
    ),
    "gpu": Measurement(speed.gpu, "docs/gpu.json", "123", 1, "full"),
    "speed": Measurement(speed.speed, "docs/speed.json", "3", 3, "full", speed.CHANGES),
}


def origin() -> dict:
    """The commit that is measured, "-dirty" if files differ, and the machine."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if "model name" in line]
    machine = {
        "cpu": names[0] if names else cpu,
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"commit": done.stdout.strip() or "unknown", "machine": machine}


def basis(measurement: Measurement, settings: Settings) -> str:
    """A few letters that change with the code, the settings and the models."""
    beyond = set(measurement.lessons) - set("123")
    rooms = ["utils", "practice", *(["more"] if beyond else [])]
    files = [path for room in rooms for path in sorted((ROOT / room).glob("*.py"))]
    files.append(Path(measurement.function.__code__.co_filename))
    if beyond:
        folders = find_artefacts(settings, "sft", "reward_model")
        files += [Path(folder) / "metrics.json" for folder in folders]
    parts = [settings, *(file.read_text("utf8") for file in files)]
    for number in measurement.lessons:
        cells = nbformat.read(ROOT / NOTEBOOKS[number], as_version=4).cells
        parts += [cell.source for cell in cells if cell.cell_type == "code"]
    return fingerprint(parts)


def by_seed(results: list):
    """Of the same nested dictionaries for each seed, one with a list over the seeds."""
    if not isinstance(results[0], dict):
        return results
    return {name: by_seed([one[name] for one in results]) for name in results[0]}


def rounded(x):
    """The same with four significant digits: the rest is rounding."""
    return json.loads(json.dumps(x), parse_float=lambda n: float(f"{float(n):.4g}"))


def alone(threads: int):
    """Prepare a process for one run, which says nothing: its bars would tear ours."""
    torch.set_num_threads(threads)
    sys.stdout = io.StringIO()


class Runs:
    """The runs of a measurement; called with some ways, it gives their figures."""

    def __init__(self, settings: Settings, seeds: int, processes: int, folder: Path):
        self.settings, self.seeds, self.processes = settings, seeds, processes
        self.folder, self.file = folder, folder / "found.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}

    def __call__(self, part: str, ways: dict, seeds=None) -> dict:
        """The figures of each way, every one a list over the seeds.

        A way is (function, *arguments): `function(settings, seed, *arguments)` is
        called in another process, and gives a dictionary. Figures called `episodes`
        must be the same for all ways, so that nothing is compared with what had more to
        learn from: raises ValueError as soon as they are not.
        """
        seeds = range(self.seeds) if seeds is None else seeds
        keys = {(s, way): f"{part}, {way}, seed {s}" for s in seeds for way in ways}
        # The tiny model is so small that threads would only wait for each other
        tiny = self.settings.preset == "tiny"
        threads = 1 if tiny else max(1, cores() // self.processes)
        start = multiprocessing.get_context("spawn")
        how = {"initializer": alone, "initargs": (threads,), "max_tasks_per_child": 1}
        pool = ProcessPoolExecutor(self.processes, start, **how)
        try:
            tasks = {
                pool.submit(ways[way][0], self.settings, s, *ways[way][1:]): key
                for (s, way), key in keys.items()
                if key not in self.found
            }
            failed = None
            for task in tqdm(as_completed(tasks), part, len(tasks)):
                if error := task.exception():
                    failed = error  # what the others find is kept
                    continue
                self.found[tasks[task]] = task.result()
                write_text(self.file, json.dumps(self.found))
                self.check(part, keys)
        finally:
            pool.shutdown(cancel_futures=True)
        if failed:
            raise failed
        self.check(part, keys)
        return {way: by_seed([self.found[keys[s, way]] for s in seeds]) for way in ways}

    def check(self, part: str, keys: dict):
        """Raise ValueError if some ways of a part had more episodes than others."""
        counts = {}
        for (_, way), key in keys.items():
            if n := self.found.get(key, {}).get("episodes"):
                counts.setdefault(n, way)
        if len(counts) > 1:
            said = " and ".join(f"{way} {n:,}" for n, way in counts.items())
            raise ValueError(
                f"{part}: {said} episodes cannot be compared; let all have as many"
            )


def main(argv=None):
    """Measure what is asked for, and write the JSON file that it is quoted from."""
    parser = argparse.ArgumentParser(prog="python -m workshop.measure")
    parser.add_argument("name", choices=KNOWN)
    parser.add_argument("--seeds", type=int, help="of each way")
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--output", type=Path, help="in the place of what is shown")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    chosen = KNOWN[options.name]
    seeds = chosen.seeds if options.seeds is None else options.seeds
    least = 2 if chosen.preset == "tiny" else 1  # for an interval; one is long there
    if seeds < least:
        parser.error(f"--seeds must be {least} or more, got {seeds}")
    if not 1 <= (n := options.processes) <= max(2, cores()):
        parser.error(f"--processes must be from 1 to {max(2, cores())}, got {n}")
    sets = [x for change in (*chosen.changes, *options.set) for x in ("--set", change)]
    made, _ = parse(["--preset", chosen.preset, "--only", "1", *sets])
    ((_, settings),) = made.values()
    try:
        folder = ROOT / "runs/measured" / options.name / basis(chosen, settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    runs = Runs(settings, seeds, options.processes, folder)
    runs.output = options.output or ROOT / chosen.output
    runs.head = {
        "command": shlex.join(["python", "-m", "workshop.measure", *argv]),
        **origin(),
        "settings": asdict(settings),
        "seeds": seeds,
    }
    found = rounded(runs.head | chosen.function(runs))
    write_text(runs.output, json.dumps(found) + "\n")
    print(f"{runs.output}: {', '.join(found.keys() - runs.head.keys())}")


if __name__ == "__main__":
    main()
