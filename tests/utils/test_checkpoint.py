"""The state of a PPO run on disk: complete, never torn, and never another run's."""

import contextlib
import copy
import dataclasses
import json
import linecache
import os

import pytest
import torch

import utils
from practice.cells import LOOP, import_cells
from tests.conftest import ROOT, refused
from tests.small import EOS, PROMPTS, SETTINGS, go, score, small_lm
from utils.models import freeze
from utils.runs import Checkpoint, code_hash, prepare, show_source

pytestmark = pytest.mark.faults
SETTINGS = dataclasses.replace(SETTINGS, ppo_episodes=144)  # six rollouts
CODE = ("fresh_run", "train", "ppo_advantages", "ppo_update")


class Started:
    """What the cells `start` and `loop` of notebook 3 do, for a very small model."""

    def __init__(
        self, settings, loop=None, reference=None, prompts=PROMPTS, device="cpu"
    ):
        self.loop = loop or import_cells("3-RLHF.ipynb", *LOOP)
        self.settings, self.path = settings, settings.folder / "ppo.pt"
        settings.folder.mkdir(parents=True, exist_ok=True)  # as `prepare` does
        lm = small_lm().float().to(device)
        self.reference = reference or freeze(copy.deepcopy(lm))
        self.run = self.loop["fresh_run"](lm, settings)
        # on a CPU too, so that there is something to lose
        scaler = torch.amp.GradScaler(lm.device.type, 4.0, growth_interval=5)
        self.run.optimizer.scaler = scaler
        code = (*(self.loop[name] for name in CODE), score)
        given = (self.run, settings, code, (self.reference, prompts))
        self.checkpoint = Checkpoint(*given, every=2)
        self.checkpoint.restore()
        self.history = self.run.history

    def go(self, until=None):
        """Train to the end, or until so many rollouts are done."""

        def pause(step):
            self.run.snapshots[step] = ({"kl": 0.1 * step}, [{"text": "é"}])
            self.checkpoint.save()
            if step == until:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            self.checkpoint.check(self.settings)
            models = (self.reference, score, lambda step: PROMPTS * 8, EOS)
            go(self.loop, self.run, models, self.settings, pause)
        return self

    def ends_as(self, other):
        """Train to the end, where it is the same run, to the last bit."""
        for name, part in vars(self.go().run).items():
            parts = (part, getattr(other.run, name))
            for how in ("get_state", "state_dict"):
                if hasattr(part, how):
                    parts = [getattr(part, how)() for part in parts]
            ours, theirs = (json.dumps(x, default=torch.Tensor.tolist) for x in parts)
            assert ours == theirs or name == "seconds", name
        return len(self.history) == 6


@pytest.fixture
def settings(tmp_path):
    return dataclasses.replace(SETTINGS, runs_dir=str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("whole"))
    return Started(dataclasses.replace(SETTINGS, runs_dir=runs)).go()


ENDS = [(1, 0), (5, 4), ("save", 2), ("replace", 2)]


@pytest.mark.parametrize("end, saved", ENDS)
def test_a_run_that_ended_early_goes_on(
    settings, whole, capsys, monkeypatch, end, saved
):
    """After so many rollouts, or in the middle of its second save."""
    with monkeypatch.context() as patch:
        if place := {"save": torch, "replace": os}.get(end):
            real, calls = getattr(place, end), []

            def breaks_off(state, file):
                calls.append(1)
                if len(calls) == 2:
                    if end == "save":
                        file.write_bytes(b"half of it")
                    raise KeyboardInterrupt
                real(state, file)

            patch.setattr(place, end, breaks_off)
        Started(settings).go(until=end)
    run = Started(settings)
    assert (f"goes on after {saved} of 6" in capsys.readouterr().out) == (saved > 0)
    assert list(run.run.snapshots) == list(range(1, saved + 1))
    assert len(run.history) == saved and run.ends_as(whole)
    # Each weight once: GPT-2's embedding is its vocabulary projection, too
    names = {name for name, _ in run.run.policy.named_parameters()}
    assert set(torch.load(run.path, weights_only=True)["policy"]) == names
    assert [p.name for p in settings.folder.iterdir()] == ["ppo.pt"]


def cell(source, namespace, file="3-RLHF.ipynb#new"):
    """Run this source as a notebook's cell, whose functions know their source."""
    file = f"{file}{len(linecache.cache)}"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    exec(compile(source, file, "exec"), namespace)
    return namespace


WHITEN = "def masked_whiten(x, mask):\n    return x * 0\n"


OTHERS = [
    ("seed and kl_coef", {"seed": 1, "kl_coef": 0.5}, {}),
    # what is advised where the GPU is full must lose nothing
    ("nothing", {"ppo_micro_batch_size": 4}, {}),
    ("device", {"precision": "bfloat16"}, {}),  # as another machine's may be
    ("model or prompts", {}, {"reference": freeze(small_lm(seed=5).float())}),
    ("model or prompts", {}, {"prompts": PROMPTS[:2]}),
    ("code", {}, {"loop": cell(WHITEN, import_cells("3-RLHF.ipynb", *LOOP))}),
]


@pytest.mark.parametrize("what, changes, option", OTHERS)
def test_another_runs_checkpoint_is_set_aside(settings, capsys, what, changes, option):
    content = Started(settings).go(until=2).path.read_bytes()
    run = Started(dataclasses.replace(settings, **changes), **option)
    if what == "nothing":
        assert len(run.history) == 2
        return
    said = capsys.readouterr().out.split("PPO begins anew: ")[1]
    assert f"{run.path} had other " in said and what in said and "ppo.aside.pt" in said
    assert not run.path.exists() and run.history == []
    assert run.path.with_name("ppo.aside.pt").read_bytes() == content


def test_what_changes_under_a_run_is_refused(settings):
    """Interrupted, something changed in a new cell, and the loop's cell run again."""
    run = Started(settings).go(until=3)
    refused("cut off after 3 of 6", run.checkpoint.check, settings, to_the_end=True)
    cell(WHITEN, run.loop)
    refused("with other code; .*begin anew", run.go)
    run.settings = dataclasses.replace(settings, kl_coef=0.7)
    for weight in run.reference.parameters():
        weight.neg_()
    refused("kl_coef and code and model or prompts", run.go)
    assert len(run.history) == 3


SPOILED = {
    "cut in the middle": lambda p: p.write_bytes(p.read_bytes()[:50_000]),
    "another file of torch": lambda p: torch.save({"w": torch.ones(3)}, p),
    "one that would run code": lambda p: torch.save({"key": print}, p),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_damaged_or_foreign_checkpoint_is_an_error_and_stays(settings, fault):
    run = Started(settings).go(until=2)
    SPOILED[fault](run.path)
    content = run.path.read_bytes()
    refused(r"cannot read .*ppo\.pt \(.*delete it if it is damaged", Started, settings)
    assert run.path.read_bytes() == content
    run.checkpoint.discard()
    assert Started(settings).history == []


def test_a_disk_that_is_full_ends_no_training(settings, whole):
    """Full for the first save, and then there is room again."""
    run = Started(settings)
    beside = run.path.with_name("ppo.unfinished.pt")
    beside.symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="could not be saved.*make room"):
        run.go(until=3)
    assert not beside.is_symlink() and not run.path.exists()
    assert run.ends_as(whole) and Started(settings).ends_as(whole)


FORMULAS = "token_rewards compute_gae masked_whiten policy_loss value_loss kl_estimate "
FORMULAS += "explained_variance sample_responses evaluate_responses response_logprobs "
FORMULAS += "has_ended collect_rollout summarise next_kl_coef ppo_loss gradients"


def test_what_the_loop_calls_counts_when_it_is_written_anew():
    loop, hashes = import_cells("3-RLHF.ipynb", *LOOP), {}
    for name in ("", *FORMULAS.split()):
        real = loop.get(name)
        cell(f"def {name or 'unknown'}(*given):\n    return 'as it was'\n", loop)
        hashes[name] = code_hash(*(loop[code] for code in CODE))
        loop[name] = real
    assert [name for name in hashes if hashes[name] == hashes[""]] == [""]


ANEW = "def {}(*given, **named):\n    raise KeyError('anew')\n"


@pytest.mark.parametrize("name", ["ppo_loss", "gradients", "collect_rollout", *CODE])
def test_a_function_that_is_written_anew_is_the_one_that_runs(settings, name):
    loop = cell(ANEW.format(name), import_cells("3-RLHF.ipynb", *LOOP))
    with pytest.raises(KeyError, match="anew"):
        Started(settings, loop).go()


BASE = """
import torch
from dataclasses import dataclass, field
from functools import partial
@dataclass
class Kept:
    rows: list = field(default_factory=lambda: [])
RATE, NAMES, TABLE = 0.5, ["a"], {"b": 1}
WORDS, WEIGHTS = {"bad", "dull"}, torch.ones(2)
def helper(x):
    return x * RATE
def loss(x):
    return helper(x) + len(NAMES) + TABLE["b"] + len(WORDS) * WEIGHTS.sum()
def update(x, loss=loss):
    return loss(x), Kept()
"""
EDITS = ["RATE = 0.25", "NAMES = ['c']", "TABLE = {'b': 2}", "def helper(x): return x"]
EDITS += ["helper = lambda x: x", "def update(x, loss=helper): return loss(x)"]
EDITS += ["update = partial(update, loss=helper)", "WORDS = {'bad', 'worse'}"]
EDITS += ["WEIGHTS = torch.zeros(2)"]
FILES = ["3.ipynb#", "/tmp/ipykernel_7/", "<ipython-input-3-"]


@pytest.mark.parametrize("file", FILES)
def test_an_edit_counts_if_the_function_reads_it(file):
    """Whatever we, Jupyter or Colab call the file of a cell."""
    counted = []
    for edit in (*EDITS, "OTHER = 1", BASE):
        names = cell(BASE, {"__name__": "__main__"}, file)
        before = code_hash(names["update"])
        if code_hash(cell(edit, names, file)["update"]) != before:
            counted.append(edit)
    assert counted == EDITS


def test_a_file_of_utils_edited_under_a_kernel_is_named(settings, monkeypatch):
    run = Started(settings)
    ways = [lambda: prepare("sft", "tiny"), lambda: show_source(cell)]
    ways.append(lambda: run.loop["fresh_run"](small_lm(), settings))
    for way in (*ways, lambda: run.checkpoint.check(settings)):
        for file in (ROOT / "utils").glob("*.py"):
            with monkeypatch.context() as patch:
                patch.setitem(utils._AT_IMPORT, file, b"# as it was")
                refused(f"^utils/{file.name} changed .*restart the kernel", way)
