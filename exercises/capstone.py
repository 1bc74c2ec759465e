"""The capstone: a change of PPO, and the share of the best possible gain it reaches.

`python -m exercises.capstone FILE NUMBER` measures what the student's cell in FILE
defines, and writes the figures beside it, as `exercises.leaderboard` wants them.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from more.common import interval_95, notebook_3
from practice.cells import import_cells
from utils.models import load_causal_lm
from utils.runs import prepare
from utils.settings import NOTEBOOKS, TINY, Settings

BUDGET = TINY.ppo_episodes  # responses that the reward model may read in one run
RUNS = 3  # of each student, with seeds that nobody else has


def begin(**changes) -> SimpleNamespace:
    """Models, prompts, scores, loop and judges of notebook 3, in the tiny world.

    `changes` are settings, for example `runs_dir`. Raises FileNotFoundError, with the
    remedy, where notebooks 1 and 2 have not run.
    """
    return notebook_3(*prepare("policy", "tiny", changes))


def changed(settings: Settings, changes: dict) -> Settings:
    """The settings with these changes.

    Raises ValueError for those that a run of PPO does not read, or above BUDGET.
    """
    names = list(vars(settings))
    of_ppo = names[names.index("temperature") : names.index("missing_eos_score")]
    if others := [name for name in changes if name not in of_ppo]:
        said = f"CHANGES has {', '.join(others)}, which is none of PPO's settings"
        raise ValueError(f"{said}; choose from {', '.join(of_ppo)}")
    settings = replace(settings, **changes)
    if (episodes := settings.ppo_episodes) > BUDGET:
        raise ValueError(f"ppo_episodes is {episodes:,}; it can be {BUDGET:,} at most")
    return settings


def run_once(lesson3, seed, advantages, update, changes) -> tuple[float, float]:
    """A run of PPO: its share of the best possible gain, and its CPU seconds.

    What is reached is measured with the preset's settings, whatever was changed. Raises
    ValueError as soon as the reward model has read more than BUDGET texts.
    """
    own, asked = changed(replace(lesson3.settings, seed=seed), changes), []

    def count(model, inputs):
        asked.append(len(inputs[0]))
        if sum(asked) > BUDGET:
            said = f"the reward model was asked for more than {BUDGET:,} responses"
            raise ValueError(f"{said}; let the run collect fewer")

    names = {**vars(lesson3), "settings": own}
    prompts_of = import_cells(NOTEBOOKS["3"], "prompts-of", names=names)["prompts_of"]
    torch.manual_seed(seed)
    run = lesson3.fresh_run(load_causal_lm(lesson3.sft_folder, lesson3.device), own)
    given = (lesson3.reference, lesson3.score, prompts_of, lesson3.eos_id, own)
    counting = lesson3.reward_model.register_forward_pre_hook(count)
    started = time.process_time()
    try:
        lesson3.train(run, *given, advantages, update)
    finally:
        counting.remove()
    seconds = time.process_time() - started
    names = {**vars(lesson3), "run": run}
    after = import_cells(NOTEBOOKS["3"], "after", names=names)["after"]
    return after["share"], seconds


def in_words(shares: list[float]) -> str:
    """Their mean, and half the width of its 95 % interval, in percent."""
    mean, half = interval_95(100 * torch.tensor(shares))
    return f"{mean:.1f} ± {half:.1f} %"


def measure(number, lesson3, advantages, update, changes) -> dict:
    """RUNS runs with this student's seeds: the shares and the seconds of each."""
    found = {"shares": [], "seconds": []}
    for seed in range(RUNS * number, RUNS * (number + 1)):
        share, seconds = run_once(lesson3, seed, advantages, update, changes)
        print(f"seed {seed}: {share:.1%} of what can be gained, {seconds:.0f} seconds")
        found["shares"].append(share)
        found["seconds"].append(seconds)
    print(f"mean, and 95 % interval: {in_words(found['shares'])}")
    return found


if __name__ == "__main__":
    file, number = Path(sys.argv[1]), int(sys.argv[2])
    code = compile(file.read_text("utf8"), file.name, "exec")
    exec(code, cell := {"lesson3": begin()})
    given = [cell[name] for name in ("lesson3", "advantages", "update", "CHANGES")]
    found = {"what": str(cell["WHAT"]), **measure(number, *given)}
    file.with_suffix(".json").write_text(json.dumps(found))
