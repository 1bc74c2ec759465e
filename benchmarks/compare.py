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
from benchmarks.ours import first_ratio
from benchmarks.work import Work, build_default, run_ppo
from utils.settings import FULL

PARTS = ("ppo", "supervised", "growth", "quality")
ALSO = {"ppo": ("ceiling",), "quality": ("trained", "first_ratio")}  # what they add
LOOPS = ("ours", "naive", "peers")
TRAINING_ROWS = 16_000  # of SFT and reward model, before the time to quality
SEED_NOTEBOOK = {  # the settings of the notebooks that this series is built on
    "ppo_lr": 1e-5,
    "value_head_lr": 1e-5,
    "kl_coef": 0.2,
    "ppo_rollout_size": 32,
    "ppo_minibatch_size": 32,
    "ppo_micro_batch_size": 32,
}


def loop(name, kind, work, *arguments, **options):
    """The PPO, SFT or reward-model loop of one of LOOPS."""
    module = importlib.import_module(f"benchmarks.{name}")
    if kind == "ppo":
        return run_ppo(module, work, **options)
    return getattr(module, kind)(work, *arguments, **options)


def supervised(name, kind, work, n_rows, trained=None):
    """One epoch of SFT or of the reward model over the first rows."""
    shortest = work.settings.sft_min_tokens if kind == "sft" else 2
    rows = work.rows("train", n_rows, shortest)
    options = {"trained": trained} if trained else {}
    found = loop(name, kind, work, rows, **options)
    return {**found, "tokens": sum(len(row) for row, _ in rows)}


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return not torch.cuda.is_available() and torch.cpu._is_avx512_bf16_supported()


class Measurements:
    """What was found so far, in a file from the first measurement on."""

    def __init__(self, file, model):
        self.file = file
        # parts that are not measured again stay
        self.found = json.loads(file.read_text()) if file.exists() else {}
        self.found |= {"machine": report.machine(), "model": report.shape_of(model)}

    def add(self, place: tuple, *, title, function, arguments=(), **options):
        """Run it in a fresh process; what it returns, also at this place."""
        print(title, end="", flush=True)
        started = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            one = pool.submit(function, *arguments, **options).result()
        print(f": {time.perf_counter() - started:.0f} s", flush=True)
        *path, last = place
        node = self.found
        for key in path:
            node = node.setdefault(key, {})
        node.setdefault(last, []).append(one)
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        return one


def measure_supervised(all_found, base, rounds, rows):
    """Tokens a second of SFT and of the reward model."""
    for number in range(rounds):
        work = dataclasses.replace(base, seed=number)
        for kind, name in itertools.product(("sft", "rm"), LOOPS):
            all_found.add(
                ("supervised", kind, name),
                title=f"{kind}, {name}, round {number + 1}",
                function=supervised,
                arguments=(name, kind, work, rows),
            )


def measure_ppo(all_found, base, rounds, episodes):
    """Seconds of the phases, where every response has 15 tokens."""
    settings = dataclasses.replace(
        base.settings,
        max_new_tokens=15,
        ppo_rollout_size=episodes,
        ppo_episodes=64 * episodes,
    )
    all_found.found["ppo_settings"] = dataclasses.asdict(settings)
    work = dataclasses.replace(base, settings=settings, never_ends=True)
    half = dataclasses.replace(settings, precision="bfloat16")
    half = dataclasses.replace(work, settings=half)
    runs = {name: (name, work) for name in LOOPS}
    if bfloat16_is_fast():
        runs["bfloat16"] = ("ours", half)
    for number in range(rounds):
        all_found.add(
            ("ceiling",), title="matrix products", function=ceiling, arguments=(work,)
        )
        for name, (module, own) in runs.items():
            all_found.add(
                ("ppo", name),
                title=f"PPO, {name}, round {number + 1}",
                function=loop,
                arguments=(module, "ppo", own),
                rollouts=2,
            )


def measure_growth(all_found, base, rounds, episodes):
    """Ours with more episodes, and with larger rollouts."""
    for _, times in itertools.product(range(rounds), (1, 2, 4)):
        settings = dataclasses.replace(
            base.settings,
            max_new_tokens=15,
            ppo_rollout_size=episodes * times,
            ppo_episodes=64 * episodes * times,
        )
        work = dataclasses.replace(base, settings=settings, never_ends=True)
        all_found.add(
            ("growth", str(episodes * times)),
            title=f"growth, rollouts of {episodes * times}",
            function=loop,
            arguments=("ours", "ppo", work),
            rollouts=9 if times == 1 else 1 + 4 // times,
        )


def measure_quality(all_found, base, rounds, folder):
    """Every loop until its texts have a reward of 0.8, or it took 4.1 times as long."""
    trained = {"sft": str(folder / "sft"), "rm": str(folder / "reward_model")}
    for kind, place in trained.items():
        all_found.add(
            ("trained", kind),
            title=f"{kind} for the time to quality",
            function=supervised,
            arguments=("ours", kind, base, TRAINING_ROWS, place),
        )
    held_out = {"eval_prompts": 512}
    ours = dataclasses.replace(base.settings, **held_out)
    settings = {
        "ours": ours,
        "naive": dataclasses.replace(ours, **SEED_NOTEBOOK),
        "peers": ours,
    }
    work = dataclasses.replace(base, model=trained["sft"], reward_model=trained["rm"])
    precisions = ["float32", "bfloat16"] if bfloat16_is_fast() else ["float32"]
    for precision in precisions:
        own = dataclasses.replace(work.settings, precision=precision)
        all_found.add(
            ("first_ratio", precision),
            title=f"first ratio, {precision}",
            function=first_ratio,
            arguments=(dataclasses.replace(work, settings=own),),
        )
    for number in range(rounds):
        limit = float("inf")
        for name in LOOPS:
            own = dataclasses.replace(work, settings=settings[name], seed=number)
            one = all_found.add(
                ("quality", name),
                title=f"time to quality, {name}, seed {number}",
                function=loop,
                arguments=(name, "ppo", own),
                every=256,
                goal=0.8,
                limit=limit,
            )
            if name == "ours":
                limit = 4.1 * one["judged"][-1]["seconds"]


def main():
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("--model", help="a causal language model (folder or name)")
    parser.add_argument("--dataset", help="reviews with sentence and label")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, default=480, help="of SFT and RM")
    parser.add_argument("--episodes", type=int, default=64, help="of a PPO rollout")
    arguments = parser.parse_args()
    folder = Path("runs/benchmark")
    model, dataset = arguments.model, arguments.dataset
    if not model or not dataset:
        built = build_default(folder)
        model, dataset = model or built[0], dataset or built[1]
    arguments.output.mkdir(parents=True, exist_ok=True)
    all_found = Measurements(arguments.output / "compare.json", model)
    # The other loops have no bound on an update, and all are to take the same steps
    base = Work(model, model, dataset, dataclasses.replace(FULL, max_approx_kl=0.0))
    options = {
        "ppo": (measure_ppo, arguments.episodes),
        "supervised": (measure_supervised, arguments.rows),
        "quality": (measure_quality, folder / "trained"),
        "growth": (measure_growth, arguments.episodes),
    }
    for part in arguments.parts:
        for old in (part, *ALSO.get(part, ())):
            all_found.found.pop(old, None)
        measure, option = options[part]
        measure(all_found, base, arguments.rounds, option)
    print(report.write(all_found.found, arguments.output))


if __name__ == "__main__":
    main()
