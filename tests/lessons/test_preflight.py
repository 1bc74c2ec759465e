"""Cells of notebook 3 around the loop: may PPO start, will it learn, what is said."""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from practice.cells import LOOP, import_cells
from tests.conftest import read
from tests.small import EOS, PROMPTS, SETTINGS, small_lm, small_tokenizer
from utils import models, rollout
from utils.models import RewardModel, freeze, load_causal_lm
from utils.plots import CURVES

NOTEBOOK = "3-RLHF.ipynb"


@pytest.fixture
def healthy(tmp_path):
    """All that stands in the notebook before the preflight; and what faults need."""

    def measured(accuracy, baseline, n):
        found = {"baseline": baseline, "validation_rows": n}
        found["after"] = {"accuracy": accuracy}
        Path(tmp_path, "metrics.json").write_text(json.dumps(found))

    measured(0.9, 0.5, 800)
    small_lm().float().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    reward_model, folder = RewardModel(small_lm(seed=2).base_model), str(tmp_path)
    names = {"settings": SETTINGS, "device": torch.device("cpu"), "eos_id": EOS}
    names["score"] = lambda ids, attention, mask: (reward_model(ids, attention),) * 2
    names |= {"reference": freeze(load_causal_lm(folder))}
    names |= {"reward_model": freeze(reward_model.float()), "measured": measured}
    names |= {"sft_folder": folder, "reward_folder": folder, "small_lm": small_lm}
    names |= {"tokenizer": small_tokenizer(), "small_tokenizer": small_tokenizer}
    names["sft_responses"] = [[3, i, EOS] for i in range(1, 9)] * 8
    names["prompts_of"] = lambda step: PROMPTS * 8
    return import_cells(NOTEBOOK, *LOOP, "start", names=names)


def positions_of_padding(mask):
    """As transformers would count them, from the padding on."""
    return torch.arange(mask.shape[1]).expand_as(mask)


# A cell that would go wrong, and the sentence that is then not so
AGAIN = "\ntrial = collect_rollout(run.policy, *models, few, eos_id, settings, None)"
SICK = {
    "run.policy.train()": "dropout is off",
    "reward_model.train()": "dropout is off",
    "reference.requires_grad_()": "are frozen",
    "reward_model.trunk = freeze(run.policy.lm.base_model)": "shares no weight",
    "run.optimizer = fresh_run(small_lm(), settings).optimizer": "the optimiser holds",
    "run.optimizer.optimizer.param_groups.pop()  # the head's": "the optimiser holds",
    "tokenizer = small_tokenizer('abcdefghj')": "the same tokenizer",
    "trial.old_logprobs *= 1.01; trial.ref_logprobs *= 1.01": "the first ratio is 1",
    "models = (freeze(small_lm(seed=1).float()), score)" + AGAIN: "KL to the reference",
    "library.position_ids = positions_of_padding" + AGAIN: "padding on the left",
    "shutil.disk_usage = lambda place: SimpleNamespace(free=1)": "the disk has room",
    "trial.input_ids[trial.mask.sum(1).argmax(), -trial.mask.shape[1]] = eos_id": (
        "EOS closes a response"
    ),
}
HOPELESS = {  # or not learn
    "measured(accuracy=0.52, baseline=0.5, n=800)": "right on 52.0%, above 54.1%",
    "measured(accuracy=0.9, baseline=0.9, n=800)": "right on 90.0%, above 92.5%",
    "sft_responses = [[3, 4]] * 6 + [[3, eos_id]] * 4": "end in EOS (40.0%)",
    "sft_responses = [[3, eos_id]] * 60 + [[4, eos_id]] * 4": "responses differ",
}


@pytest.mark.parametrize("fault", [*SICK, *HOPELESS])
def test_a_sick_start_is_named_and_stopped(fault, healthy, capsys, monkeypatch):
    """To learn nothing is everybody's right (train_anyway), a mistake is not."""

    def check(train_anyway):
        settings = dataclasses.replace(SETTINGS, train_anyway=train_anyway)
        names = {**healthy, "settings": settings}
        import_cells(NOTEBOOK, "preflight", "preflight-learn", names=names)

    capsys.readouterr()
    check(train_anyway=False)
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["✓"] * 13
    for place, name in ((models, "position_ids"), (shutil, "disk_usage")):
        monkeypatch.setattr(place, name, getattr(place, name))  # put back
    healthy |= {"library": models, "positions_of_padding": positions_of_padding}
    healthy |= {"shutil": shutil, "SimpleNamespace": SimpleNamespace}
    exec(fault, healthy)
    says = re.escape((SICK | HOPELESS)[fault])
    began = "go wrong" if fault in SICK else "not learn"
    with pytest.raises(RuntimeError, match=f"^PPO would {began}[^\n]*{says}[^\n]*$"):
        check(train_anyway=fault in SICK)
    if fault in HOPELESS:
        check(train_anyway=True)
    assert re.search(f"✗ .*{says}", capsys.readouterr().out)


def test_half_precision_may_start(healthy, capsys, monkeypatch):
    """Where it rounds by the width of a text, as large matrices do (here: always)."""

    def rounded(trunk, ids, *others):
        states = models.hidden_states(trunk, ids, *others)
        return states * 1.01 ** (ids.shape[1] * torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(rollout, "hidden_states", rounded)
    names = healthy | {"settings": dataclasses.replace(SETTINGS, precision="float16")}
    names = import_cells(NOTEBOOK, *LOOP, "start", names=names)
    import_cells(NOTEBOOK, "preflight", "preflight-learn", names=names)
    assert "✗" not in capsys.readouterr().out


HEALTHY = {"eos_rate": 0.95, "empty": 0.02, "different": 0.9, "kl": 3.0, "entropy": 1.2}
HEALTHY |= {"approx_kl": 0.01, "explained_variance": -0.1}


def signs(*histories):
    astray, found = import_cells(NOTEBOOK, "snapshot")["astray"], {}
    history = [HEALTHY | changes for changes, n in histories for _ in range(n)]
    for n in range(1, len(history) + 1):
        for row in astray(history[:n]):
            found.setdefault(row, []).append(n)
    return found


# Ten healthy rollouts, and then this; seen when the mean of three is beyond, and not
# if it was a single one, in which it was as odd as this
SIGNS = [
    ("eos_rate", 0.7, 0.5, "EOS rate", 13),
    ("empty", 1.0, 0.9, "empty responses", 12),
    ("different", 0.02, 0.05, "different responses", 13),
    ("kl", 45.0, 80.0, "KL to the reference", 13),
    ("entropy", 0.01, 0.0, "entropy", 13),
    ("approx_kl", 0.12, 0.2, "approx_kl", 13),
    ("explained_variance", -0.3, -5.0, "explained variance", 20),  # so for ten
]


@pytest.mark.parametrize("name, value, odd, row, first", SIGNS)
def test_what_lasts_is_a_sign_and_has_its_row(name, value, odd, row, first):
    assert signs(({}, 10), ({name: odd}, 1), ({}, 10)) == {}
    assert signs(({}, 10), ({name: value}, 15)) == {row: list(range(first, 26))}
    # a world of one prompt repeats itself from the start, a value head has to learn
    assert signs(({"different": 0.06, "explained_variance": -5}, 9)) == {}
    (text,) = (cell.source for cell in read(NOTEBOOK).cells if cell.id == "glossary")
    (remedy,) = re.findall(rf"\n\| [^|]*{row}[^|]*\|[^|]*\|[^|]*\|([^|]*)\|", text)
    assert len(remedy) > 10


def test_a_pause_looks_draws_and_says_once():
    """Of four rollouts; and in another process, which goes on after the third."""
    row = dict.fromkeys([name for name, *_ in CURVES], 0.1) | HEALTHY | {"kl": 99.0}
    run = SimpleNamespace(policy=None, history=[], snapshots={}, said=[])
    written, saved, drawn = [], [], []
    shown = SimpleNamespace(update=lambda picture, **_: drawn.append([*picture]))
    checkpoint = SimpleNamespace(save=lambda: saved.append(len(run.history)))

    def evaluate(*_, **__):  # which may fail: what it looks at is saved
        assert saved[-1] == len(run.history)
        return {"kl": 0.0}, [1] * 9

    names = {"settings": dataclasses.replace(SETTINGS, ppo_episodes=4 * 24), "run": run}
    names |= {"evaluate": evaluate, "held_out": PROMPTS, "time": time}
    names |= {"checkpoint": checkpoint}
    for steps in (range(4), range(3, 5)):
        cells = import_cells(NOTEBOOK, "snapshot", "pause", names=names)
        cells |= {"display": lambda **_: shown, "tqdm": SimpleNamespace()}
        cells["tqdm"].write = written.append
        cells["curves"] |= {"shown": None, "next": 0}  # so that it is time
        for step in steps:
            run.history = [row] * step
            cells["pause"](step)
    assert run.snapshots == {step: ({"kl": 0.0}, [1] * 6) for step in range(5)}
    assert saved == [0, 1, 2, 3, 3, 4]
    # once in each, since the next is not due; and what stands there at the end
    assert drawn == [["image/png"], ["image/png"], ["text/plain"]]
    assert written == ["rollout 3, KL to the reference: see the glossary below"]
