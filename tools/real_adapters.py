"""PPO on one base, with a real model: `python -m tools.real_adapters`.

What `tools.real_run` did with three models, done again with the weights of one: on its
SFT model a reward adapter is trained, and then a policy adapter (layout 2 of
`more/8-Adapters.ipynb`, by that notebook's functions). SFT is not done again, so that
both ways begin at the same model and differ in nothing but the adapters; and full
fine-tuning's reward model and judge look at both.

Each stage is a process of its own, of which seconds and memory are measured. What is
there is not done again, and PPO goes on from its checkpoint. The figures go to
`docs/real-run/adapters.json`. With `--stage four-bits`, before that, what the SFT model
is in 4 bits is measured, too (bitsandbytes has to be installed).
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from more.common import write_text
from more.lora import (
    WEIGHTS,
    adapter_checks,
    load_adapter,
    load_in_4_bits,
    save_adapter,
)
from more.memory import bytes_of
from practice.cells import LOOP, import_cells
from tools import real_run
from tools.race import rounded
from tools.real_run import FOLDER, RUNS, run_measured
from utils.data import load_reviews, load_tokenizer, pad, tokenize
from utils.models import PolicyWithValueHead, freeze, load_causal_lm
from utils.runs import ROOT, Checkpoint, prepare
from utils.settings import FULL, Settings
from utils.training import seed_everything

RESULTS = FOLDER / "adapters.json"
OURS = Path("runs/real-adapters")
LESSON = "more/8-Adapters.ipynb"
BUILD = ("reward-adapter", "reward-on", "build", "fresh-adapter-run")
START = ("prompts", "prompts-of", "batch", "score", "score-function", *LOOP)
ON_THE_BASE = "on-the-sft-model"  # what notebook 8 calls the reward adapter of layout 2
RANK = 16  # of the policy's adapter
TEXTS = 64  # on which a model in 4 bits is compared
# Ten times full fine-tuning's; notebook 8 takes three times rm_lr
RATES = {"rm_lr": 10 / 3 * FULL.rm_lr, "ppo_lr": 10 * FULL.ppo_lr}


def read(path):
    """What a JSON file of a run holds."""
    return json.loads((ROOT / path).read_text("utf8"))


def lesson8(ours: Settings, device, lesson3) -> SimpleNamespace:
    """Layout 2 of notebook 8, with these settings, and `lesson3` for notebook 3."""
    names = {"settings": ours, "device": device, "lesson3": lesson3}
    return SimpleNamespace(**import_cells(LESSON, *BUILD, names=names))


def train_reward(theirs: Settings, ours: Settings, device):
    """A reward adapter on the SFT model, with its accuracy beside it."""
    eight = lesson8(ours, device, None)
    place = eight.ADAPTERS / ON_THE_BASE
    accuracy = eight.train_reward_adapter(str(theirs.folder / "sft"), place)
    whole = read(theirs.folder / "reward_model/metrics.json")
    known = {key: whole[key] for key in ("baseline", "validation_rows")}
    metrics = {**known, "after": {"accuracy": accuracy}}
    write_text(place / "metrics.json", json.dumps(metrics))


def train_policy(theirs: Settings, ours: Settings, device):
    """A policy adapter by PPO, with nothing in memory but one base and two adapters.

    After notebook 3's look at whether there is anything to learn, and saved now and
    then.
    """
    sft_folder = str(theirs.folder / "sft")
    three = SimpleNamespace(sft_folder=sft_folder)
    eight = lesson8(ours, device, three)
    seed_everything(ours.seed)
    policy, reference, reward_model, _ = eight.build(2, RANK)
    names = {
        "settings": ours,
        "device": device,
        "tokenizer": load_tokenizer(sft_folder),
    }
    names |= {"reference": reference, "reward_model": reward_model}
    vars(three).update(import_cells("3-RLHF.ipynb", *START, names=names))
    run, rest = eight.fresh_adapter_run(policy, ours), (three.eos_id, ours)

    few = three.prompts_of(0)[: ours.ppo_micro_batch_size]
    models = (reference, three.score)
    trial = three.collect_rollout(run.policy, *models, few, *rest, run.generator)
    run.generator.manual_seed(ours.seed)  # as notebook 3 does
    checks = adapter_checks(run.policy, reference, reward_model, trial, ours)
    names = {"taken_for_granted": checks, "reward_folder": eight.ADAPTERS / ON_THE_BASE}
    import_cells("3-RLHF.ipynb", "preflight-learn", names=vars(three) | names)

    how = (three.ppo_advantages, three.ppo_update)
    code = (eight.fresh_adapter_run, three.prompts_of, three.score, three.train, *how)
    inputs = (reference, reward_model, three.train_prompts)
    checkpoint = Checkpoint(run, ours, code, inputs, every=2)
    checkpoint.restore()
    models = (reference, three.score, three.prompts_of)
    three.train(run, *models, *rest, *how, pause=lambda step: checkpoint.save())

    save_adapter(run.policy.lm, "policy", eight.ADAPTERS / "policy")
    saved = load_causal_lm(sft_folder).state_dict()
    now = reference.state_dict().items()
    moved = sum(not torch.equal(weight.cpu(), saved[name]) for name, weight in now)
    metrics = {"ppo_seconds": run.seconds, "moved": moved, "history": run.history}
    write_text(eight.ADAPTERS / "policy/metrics.json", json.dumps(metrics))


def judge(theirs: Settings, ours: Settings, device):
    """The policy's figures before and after, as full fine-tuning's models see it."""
    names = {"settings": theirs, "device": device}
    cells = ("load", *START, "judges", "evaluate")
    three = SimpleNamespace(**import_cells("3-RLHF.ipynb", *cells, names=names))
    folder, lm = (
        ours.folder / "adapters/policy",
        load_causal_lm(three.sft_folder, device),
    )
    models = {"before": three.reference, "after": load_adapter(lm, "policy", folder)}
    found = {}
    for when, model in models.items():
        figures, _ = three.evaluate(freeze(PolicyWithValueHead(model).to(device)))
        objective = figures["score"] - theirs.kl_coef * figures["kl"]
        found[when] = {**figures, "objective": objective}
    write_text(folder / "figures.json", json.dumps(found))


@torch.no_grad()
def four_bits(theirs: Settings, ours: Settings, device):
    """What the SFT model forgets where its linear layers are rounded to 4 bits."""
    folder = str(theirs.folder / "sft")
    tokenizer = load_tokenizer(folder)
    sentences = list(load_reviews(theirs)["validation"]["sentence"])[:TEXTS]
    rows = tokenize(sentences, tokenizer, theirs.max_tokens)
    ids, mask = pad(rows, tokenizer.eos_token_id)
    real, found, logprobs = mask[:, 1:].bool(), {}, []
    for way, load in (("float32", load_causal_lm), ("4 bits", load_in_4_bits)):
        lm = load(folder).eval()
        logits = lm(input_ids=ids, attention_mask=mask).logits[:, :-1][real]
        logprobs.append(logits.log_softmax(dim=-1))
        loss = -logprobs[-1].gather(1, ids[:, 1:][real][:, None]).mean().item()
        found[way] = {"bytes": bytes_of(_tensors_of(lm)), "loss": loss}
    exact, in_bits = logprobs
    found["kl"] = (exact.exp() * (exact - in_bits)).sum(dim=1).mean().item()
    found["next words"] = len(exact)
    ours.folder.mkdir(parents=True, exist_ok=True)
    write_text(ours.folder / "four_bits.json", json.dumps(found))


def _tensors_of(lm):
    """Its weights, and the scales of those in 4 bits."""
    for parameter in lm.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # the scales of the scales, too
            yield from (x for x in vars(state).values() if torch.is_tensor(x))
            state = state.state2


STAGES = {"reward": train_reward, "policy": train_policy, "judge": judge}
ALONE = {"four-bits": four_bits}  # only where it is asked for: it needs bitsandbytes


def settings_of(seed: int, changes: list[str]) -> tuple[Settings, Settings]:
    """Those of full fine-tuning, and ours, with these changes (FIELD=VALUE).

    Raises FileNotFoundError if `tools.real_run` has not run this seed.
    """
    cost = RUNS / str(seed) / FULL.preset / "policy-cost.json"
    if not (ROOT / cost).exists():
        raise FileNotFoundError(f"there is no {cost}; run python -m tools.real_run")
    theirs = [*read(cost)["changes"], f"seed={seed}"]
    rates = [f"{name}={rate}" for name, rate in RATES.items()]
    ours = [*theirs, *rates, f"runs_dir={OURS / str(seed)}", *changes]
    theirs.append(f"runs_dir={RUNS / str(seed)}")
    return real_run.settings_of(theirs), real_run.settings_of(ours)


def collect(theirs: Settings, ours: Settings, changes: list[str]) -> dict:
    """What was measured, beside full fine-tuning of the same model."""
    place, bits = ours.folder / "adapters", ours.folder / "four_bits.json"
    mine, full = (read(x / "policy/metrics.json") for x in (place, theirs.folder))
    reward, whole = place / ON_THE_BASE, theirs.folder / "reward_model"
    accuracy, full_accuracy = (
        read(x / "metrics.json")["after"]["accuracy"] for x in (reward, whole)
    )
    return {
        "seed": theirs.seed,
        "changes": changes,
        "rank": RANK,
        "episodes": len(mine["history"]) * ours.ppo_rollout_size,
        "rates": {name: getattr(ours, name) for name in RATES},
        "cost": {stage: read(ours.folder / f"{stage}-cost.json") for stage in STAGES},
        "ppo_seconds": mine["ppo_seconds"],
        "moved": mine["moved"],
        "adapter_bytes": (ROOT / place / "policy" / WEIGHTS).stat().st_size,
        "accuracy": accuracy,
        **read(place / "policy/figures.json"),
        "history": _curves(mine["history"]),
        "four_bits": read(bits) if (ROOT / bits).exists() else {},
        "full": {
            "episodes": len(full["history"]) * theirs.ppo_rollout_size,
            "peak_gib": read(theirs.folder / "policy-cost.json")["peak_gib"],
            "ppo_seconds": full["seconds"],
            "accuracy": full_accuracy,
            "before": full["before"],
            "after": full["after"],
            "history": _curves(full["history"]),
        },
    }


def _curves(history):
    return {name: [row[name] for row in history] for name in ("score", "kl")}


def main(argv=None):
    """Do what is missing, and write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.real_adapters",
        description="PPO with two adapters on one real model, beside tools.real_run.",
    )
    parser.add_argument("--seed", type=int, default=FULL.seed, help="of tools.real_run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes"
    )
    parser.add_argument("--stage", choices=STAGES | ALONE, help="this one only, here")
    options = parser.parse_args(argv)
    try:
        theirs, ours = settings_of(options.seed, options.changes)
    except FileNotFoundError as error:
        parser.error(str(error))
    if options.stage:
        torch.set_num_threads(options.threads)
        given = asdict(theirs)
        _, device = prepare("policy", given.pop("preset"), given)
        (STAGES | ALONE)[options.stage](theirs, ours, device)
        return
    for stage in STAGES:
        cost = ROOT / ours.folder / f"{stage}-cost.json"
        if cost.exists():
            continue
        command = [sys.executable, "-m", "tools.real_adapters", "--stage", stage]
        command += ["--seed", str(options.seed), "--threads", str(options.threads)]
        command += [word for one in options.changes for word in ("--set", one)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        failed, spent = run_measured(command, environment)
        if failed:
            sys.exit(f"it stopped in the stage {stage}, see above")
        write_text(cost, json.dumps(spent))
    found = rounded(collect(theirs, ours, options.changes))
    write_text(ROOT / RESULTS, json.dumps(found) + "\n")
    print(f"{RESULTS}: {found['episodes']:,} episodes")


if __name__ == "__main__":
    main()
