"""What notebooks 1 to 3 give over several seeds: the tiny preset, and a real model."""

import json
import re
import shutil
import statistics
import subprocess
import sys

import nbformat

from more.common import write_text
from practice import tiny_world
from utils.data import load_tokenizer
from utils.settings import NOTEBOOKS, ROOT, STAGES


def whole_run(settings, seed, folder: str) -> dict:
    """Notebooks 1 to 3 with this seed: their figures, and what each of them took.

    That is seconds of the processors, not of the clock, which also counts what else the
    machine was doing; and the memory of the largest process so far [GiB]. What is in
    `folder` is not run again. Raises RuntimeError, with its last words, if one fails.
    """
    import resource  # Windows has none

    found = {"before": {}, "after": {}, "seconds": {}, "peak_gib": {}}
    for number, stage in zip("123", STAGES, strict=True):
        made = ROOT / folder / str(seed) / settings.preset / stage
        cost = made.with_name(f"{stage}-cost.json")
        if not (cost.exists() and made.exists()):
            command = [sys.executable, "-m", "utils", "--preset", settings.preset]
            changes = {"seed": seed, "runs_dir": f"{folder}/{seed}"}
            for name, value in (settings.changes | changes).items():
                command += ["--set", f"{name}={value}"]
            before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            command += ["--only", number]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"seed {seed} failed:\n{done.stderr[-3000:]}")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = sum(after[:2]) - before  # of the user and of the system
            spent = {"seconds": seconds, "peak_gib": after.ru_maxrss / 2**20}  # of KiB
            write_text(cost, json.dumps(spent))
        metrics = json.loads((made / "metrics.json").read_text())
        for when in ("before", "after"):
            found[when] |= metrics.get(when, {})
        for name, x in json.loads(cost.read_text()).items():
            found[name][stage] = x
    # Of PPO, the last one
    return found | {"first_approx_kl": metrics["history"][0]["approx_kl"]}


def tiny_run(settings, seed, folder: str) -> dict:
    """The tiny preset, from a model that was pre-trained with a seed of its own.

    Another processor rounds otherwise, so the model that it builds for the tiny world
    is another one, too.
    """
    world = ROOT / folder / str(seed) / settings.preset / "world"
    if not world.exists():
        beside = world.with_name("world.unfinished")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(tiny_world.build_world(ROOT / tiny_world.WORLD), beside)
        tokenizer = load_tokenizer(beside / "model")
        model = tiny_world.pretrain(tokenizer, show_progress=False, seed=1000 + seed)
        model.save_pretrained(beside / "model")
        beside.rename(world)
    return whole_run(settings, seed, folder)


def expected(runs) -> dict:
    """Mean and standard deviation of every figure of the tiny preset after training.

    Every run of the preset shows its own figures beside mean ± 4 standard deviations.
    """
    found = runs("seeds", {"tiny": (tiny_run, str(runs.folder))})["tiny"]["after"]
    return {
        "figures": {
            name: [statistics.mean(values), statistics.stdev(values)]
            for name, values in found.items()
        }
    }


LOCAL_LINK = re.compile(r"\]\((?!https?:|#)")
OUTPUTS = re.compile(r"^\*The outputs on this page .*\*$", re.M)


def as_shown(notebook, command: str):
    """An executed notebook as it stands in docs/real-run.

    Its links lead from there to the same places, its first cell says what it is, and
    no warning names a folder of the machine that it ran on.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LOCAL_LINK.sub("](../../", cell.source)
        else:
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    title = notebook.cells[0]
    title.source = OUTPUTS.sub(f"*A real model's run, by `{command}`.*", title.source)
    return notebook


def real_run(runs) -> dict:
    """The preset `full`: figures, seconds and memory; and the executed notebooks.

    For `--set model_name=...`; with HF_HUB_OFFLINE or HF_ENDPOINT set, model and data
    come from there. The seeds are the preset's own and those after it.
    """
    first, folder = runs.settings.seed, runs.output.parent
    ways = {"full": (whole_run, str(runs.folder))}
    found = runs("seeds", ways, range(first, first + runs.seeds))["full"]
    figures = {}
    for when in ("before", "after"):
        for name, values in found.pop(when).items():
            figures.setdefault(name, {})[when] = values
    found["peak_gib"] = max(max(x) for x in found["peak_gib"].values())
    found |= {"figures": figures}
    folder = folder if folder != ROOT else runs.folder  # it has the lessons
    for number in "123":
        name = NOTEBOOKS[number]
        executed = nbformat.read(runs.folder / str(first) / "full" / name, 4)
        executed = as_shown(executed, runs.head["command"])
        (folder / name).write_text(nbformat.writes(executed) + "\n", "utf8")
    return found
