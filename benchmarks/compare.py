"""`python -m benchmarks.compare`: the loops of the notebooks beside others.

Each measurement runs in a process of its own, the loops in turn, so that a machine
that slows down slows all of them. Writes a table, the raw numbers and a plot.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.ceiling import ceiling
from benchmarks.work import Work, build_default, run_ppo
from utils.settings import FULL

LOOPS = ("ours", "naive", "peers")


def ppo(name, work, rollouts=2):
    """Seconds by phase of one of LOOPS."""
    module = importlib.import_module(f"benchmarks.{name}")
    return run_ppo(module.ppo, work, rollouts)


def supervised(name, kind, work, n_rows):
    """One epoch of SFT or of the reward model over the first rows."""
    shortest = work.settings.sft_min_tokens if kind == "sft" else 2
    rows = work.rows(n_rows, shortest)
    module = importlib.import_module(f"benchmarks.{name}")
    found = getattr(module, kind)(work, rows)
    return {**found, "tokens": sum(len(row) for row, _ in rows)}


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return not torch.cuda.is_available() and torch.cpu._is_avx512_bf16_supported()


def measure_supervised(base, rounds, n_rows):
    """What to run for tokens a second of SFT and of the reward model."""
    for number, kind, name in itertools.product(range(rounds), ("sft", "rm"), LOOPS):
        work = dataclasses.replace(base, seed=number)
        yield ("supervised", kind, name), supervised, (name, kind, work, n_rows)


def measure_ppo(base, rounds, n_rows):
    """What to run for the seconds of the phases."""
    half = dataclasses.replace(base.settings, precision="bfloat16")
    half = dataclasses.replace(base, settings=half)
    for _ in range(rounds):
        yield ("ceiling",), ceiling, (base,)
        for name in LOOPS:
            yield ("ppo", name), ppo, (name, base)
        if bfloat16_is_fast():
            yield ("ppo", "bfloat16"), ppo, ("ours", half)


PARTS = {"ppo": measure_ppo, "supervised": measure_supervised}


def main(argv=None):
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("--model", help="a causal language model (folder or name)")
    parser.add_argument("--dataset", help="reviews with sentence and label")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=480, help="of SFT and RM")
    parser.add_argument("--episodes", type=int, default=64, help="of a PPO rollout")
    options = parser.parse_args(argv)
    model, dataset = options.model, options.dataset
    if not model or not dataset:
        built = build_default(Path("runs/benchmark"))
        model, dataset = model or built[0], dataset or built[1]
    options.output.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(
        FULL,
        # The other loops have no bound on an update, and all are to take the same steps
        max_approx_kl=0.0,
        max_new_tokens=15,
        ppo_rollout_size=options.episodes,
        ppo_episodes=64 * options.episodes,
    )
    work = Work(model, dataset, settings)
    file = options.output / "compare.json"
    # Parts that are not measured again stay
    found = json.loads(file.read_text()) if file.exists() else {}
    found |= {"machine": report.machine(), "model": report.shape_of(model)}
    spawn = multiprocessing.get_context("spawn")
    for part in options.parts:
        found.pop(part, None)
        if part == "ppo":
            found.pop("ceiling", None)
            found["ppo_settings"] = dataclasses.asdict(settings)
        for place, function, arguments in PARTS[part](
            work, options.rounds, options.rows
        ):
            started = time.perf_counter()
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                one = pool.submit(function, *arguments).result()
            seconds = time.perf_counter() - started
            print(f"{', '.join(place)}: {seconds:.0f} s", flush=True)
            *path, last = place
            node = found
            for key in path:
                node = node.setdefault(key, {})
            node.setdefault(last, []).append(one)
            file.write_text(json.dumps(found, indent=1) + "\n")
    print(report.write(found, options.output))


if __name__ == "__main__":
    main()
