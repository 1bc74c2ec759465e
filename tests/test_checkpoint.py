"""The state of a PPO run on disk: complete, never torn, and never another run's."""

import copy
import dataclasses
import json
import multiprocessing
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_loop import SETTINGS as LOOP_SETTINGS
from tests.test_loop import score
from tests.test_rollout import EOS, PROMPTS, small_lm
from utils.models import freeze
from utils.support import checkpoint as checkpoint_module
from utils.support.checkpoint import Checkpoint, read_state, write_state
from utils.support.notebook import import_cells

pytestmark = pytest.mark.faults
SETTINGS = dataclasses.replace(LOOP_SETTINGS, ppo_episodes=144, checkpoint_every=2)
CELLS = ("fresh-policy", "collect-rollout", "ppo-update")


class Run:
    """What the cells `start` and `loop` of notebook 3 do, for a very small model."""

    def __init__(self, settings, device="cpu", code=(), **inputs):
        device = torch.device(device)
        self.loop = import_cells("3-RLHF.ipynb", *CELLS)
        self.settings = settings
        lm = small_lm().float()
        self.reference = freeze(copy.deepcopy(lm))
        policy, optimizer, decay = self.loop["fresh_policy"](lm, settings)
        self.parts = {
            "policy": policy,
            "optimizer": optimizer,
            "decay": decay,
            # on a CPU too, so that there is something to lose
            "scaler": torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5),
            "generator": torch.Generator().manual_seed(settings.seed),
        }
        inputs = {"reference": self.reference, "prompts": PROMPTS, **inputs}
        self.checkpoint = Checkpoint(settings, device, self.parts, code, inputs)
        start = ([], {}, settings.kl_coef)
        self.history, self.snapshots, self.kl_coef = self.checkpoint.restore(*start)

    def go(self, until=None):
        """Train to the end, or until so many rollouts are done."""
        policy, optimizer, decay, scaler, generator = self.parts.values()
        s = self.settings
        for step in range(len(self.history), until or s.ppo_steps):
            rollout = self.loop["collect_rollout"](
                *(policy, self.reference, score, PROMPTS * 8, EOS, s, self.kl_coef),
                generator,
            )
            stats = self.loop["ppo_update"](
                policy, optimizer, scaler, rollout, s, generator
            )
            figures = {name: float(values.mean()) for name, values in stats.items()}
            # the states of the other random generators matter to the result, too
            figures["noise"] = random.random() + torch.rand(()).item()
            self.history.append(figures)
            self.snapshots[step] = (figures, [{"text": "é"}])
            decay.step()
            self.kl_coef *= 1.01
            self.checkpoint.save(self.history, self.snapshots, self.kl_coef)
        return self


def started(settings, **options):
    random.seed(1)
    torch.manual_seed(1)
    return Run(settings, **options)


@pytest.fixture
def settings(tmp_path):
    return dataclasses.replace(SETTINGS, runs_dir=str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    runs = tmp_path_factory.mktemp("whole")
    return started(dataclasses.replace(SETTINGS, runs_dir=str(runs))).go()


def same(run, other):
    assert run.history == other.history and len(run.history) == 6
    assert run.kl_coef == other.kl_coef
    for name, part in run.parts.items():
        a, b = (
            dict(part.named_parameters())
            if isinstance(part, torch.nn.Module)
            else {"state": part.get_state()}
            if isinstance(part, torch.Generator)
            else part.state_dict()
            for part in (part, other.parts[name])
        )
        assert json.dumps(a, default=lambda x: x.tolist()) == json.dumps(
            b, default=lambda x: x.tolist()
        )


@pytest.mark.parametrize("rollouts, saved", [(2, 2), (3, 2), (5, 4), (6, 6)])
def test_an_interrupted_run_ends_where_it_would_have(
    settings, whole, capsys, rollouts, saved
):
    started(settings).go(until=rollouts)
    random.seed(99)  # a new process draws otherwise
    torch.manual_seed(99)
    run = Run(settings)
    assert f"goes on after {saved} of 6 rollouts" in capsys.readouterr().out
    assert len(run.history) == saved and list(run.snapshots) == list(range(saved))
    same(run.go(), whole)


def test_nothing_is_saved_before_it_is_time(settings, capsys):
    started(settings).go(until=1)
    assert not list(settings.folder.glob("*"))
    said = capsys.readouterr().out
    assert said == f"PPO begins, and is saved every 2 rollouts to {settings.folder}/ppo.safetensors\n"  # fmt: skip # noqa: E501


def test_the_last_rollout_is_saved_whatever_its_number(settings):
    settings = dataclasses.replace(settings, checkpoint_every=4)
    started(settings).go()
    assert len(Run(settings).history) == 6


def test_discard_begins_anew(settings, whole, capsys):
    started(settings).go().checkpoint.discard()
    run = started(settings)
    assert run.history == [] and "PPO begins, " in capsys.readouterr().out
    same(run.go(), whole)
    run.checkpoint.discard()
    run.checkpoint.discard()  # twice is harmless


@pytest.mark.parametrize(
    "changes, options, says",
    [
        ({"ppo_lr": 0.5}, {}, "had ppo_lr 0.0002 instead of 0.5"),
        (
            {"seed": 1, "kl_coef": 0.5},
            {},
            "seed 42 instead of 1, kl_coef 0.1 instead of",
        ),
        (
            {"model_name": "gpt2"},
            {},
            "model_name 'runs/tiny/world/model' instead of 'g",
        ),
        ({}, {"reference": freeze(small_lm(seed=5).float())}, "had another reference"),
        ({}, {"prompts": PROMPTS[:2]}, "had another prompts"),
        ({}, {"code": (score,)}, "had another score"),
        ({"ppo_episodes": 24}, {}, "ppo_episodes 144 instead of 24"),
        # another machine, as a free runtime may be next time
        ({}, {"device": "meta"}, "device 'cpu' instead of 'meta'"),
        (
            {"precision": "float16"},
            {},
            "dtype 'torch.float32' instead of 'torch.float16",
        ),
    ],
)
def test_another_runs_checkpoint_is_named_and_set_aside(
    settings, capsys, survived, changes, options, says
):
    started(settings).go(until=2)
    content = (settings.folder / "ppo.safetensors").read_bytes()
    run = started(dataclasses.replace(settings, **changes), **options)
    said = capsys.readouterr().out.splitlines()[-1]
    assert run.history == [] and said.startswith("PPO begins anew")
    assert says in said and said.endswith("; renamed to ppo.safetensors.aside-1")
    assert (settings.folder / "ppo.safetensors.aside-1").read_bytes() == content
    for weight, first in zip(
        run.parts["policy"].lm.parameters(), run.reference.parameters(), strict=True
    ):
        assert torch.equal(weight, first)
    survived("checkpoint of another run", said)


def test_a_setting_that_changes_nothing_does_not_matter(settings, whole):
    started(settings).go(until=2)
    changes = {"frontier_rollouts": 3, "best_of_n": 2, "checkpoint_every": 3}
    lower = dataclasses.replace(settings, ppo_micro_batch_size=4)  # after a full GPU
    assert len(Run(lower).history) == 2
    same(Run(dataclasses.replace(settings, **changes)).go(), whole)


def test_a_finished_run_of_other_settings_is_replaced(settings, capsys):
    started(settings).go()
    started(dataclasses.replace(settings, kl_coef=0.5)).go()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("had kl_coef 0.1 instead of 0.5")
    assert [p.name for p in settings.folder.iterdir()] == ["ppo.safetensors"]


def test_an_edit_of_the_series_begins_anew(settings, tmp_path, monkeypatch, capsys):
    """Of a function in the notebook, or of a file that learners read."""

    def ppo_update():
        return 1

    before = ppo_update
    exec_free = tmp_path / "utils"
    exec_free.mkdir()
    (exec_free / "ppo.py").write_text("eps = 0.2")
    monkeypatch.setattr(checkpoint_module, "READ_BY_LEARNERS", exec_free)
    started(settings, code=(before,)).go(until=2)
    assert len(started(settings, code=(before,)).history) == 2

    def ppo_update():  # noqa: F811
        return 2

    assert started(settings, code=(ppo_update,)).history == []
    assert "had another ppo_update" in capsys.readouterr().out
    started(settings, code=(before,)).go(until=2)
    (exec_free / "ppo.py").write_text("eps = 0.3")
    assert started(settings, code=(before,)).history == []
    assert "had another utils/ppo.py" in capsys.readouterr().out


def foreign(path):
    save_file({"w": torch.ones(3)}, path)


SPOILED = {
    "cut in the middle": lambda p: p.write_bytes(
        p.read_bytes()[: p.stat().st_size // 2]
    ),
    "one byte short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "cut in its header": lambda p: p.write_bytes(p.read_bytes()[:100]),
    "empty": lambda p: p.write_bytes(b""),
    "another safetensors file": foreign,
    "a text": lambda p: p.write_text("my notes on PPO\n" * 20),
    "pickled": lambda p: torch.save({"w": torch.ones(3)}, p),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_damaged_or_foreign_checkpoint_is_set_aside(
    settings, whole, capsys, survived, fault
):
    started(settings).go(until=2)
    file = settings.folder / "ppo.safetensors"
    SPOILED[fault](file)
    content = file.read_bytes()
    run = started(settings)
    begins, renamed = capsys.readouterr().out.splitlines()[-2:]
    assert begins.startswith(f"PPO begins anew: {file} is damaged or another file (")
    assert renamed == "(it was renamed to ppo.safetensors.aside-1)"
    assert (settings.folder / "ppo.safetensors.aside-1").read_bytes() == content
    same(run.go(), whole)
    survived(f"checkpoint: {fault}", begins.split("(", 1)[1] + " " + renamed)


def test_a_disk_that_is_full_ends_no_training(settings, whole, survived):
    """Full for the first saves, and then there is room again."""
    run = started(settings)
    settings.folder.write_text("no folder can be made here")
    with pytest.warns(UserWarning, match="2 rollouts could not be saved to") as caught:
        run.go(until=3)
    settings.folder.unlink()
    run.go()
    same(run, whole)
    same(Run(settings), whole)
    survived("a checkpoint cannot be written", str(caught[0].message))


def test_a_nest_of_everything_comes_back(tmp_path):
    tensors = [torch.randn(2, 3), torch.arange(4, dtype=torch.uint8), torch.tensor(2.5)]
    state = {
        "a": {1: tensors[0], "1": tensors[1], None: True},
        "b": [1, 2.5, float("inf"), "é", None, (tensors[2], {})],
        "pairs": {"tensor": 1},
    }
    write_state(tmp_path / "x", {"k": 1}, state)
    key, found = read_state(tmp_path / "x")
    assert key == {"k": 1} and list(found) == ["a", "b", "pairs"]
    assert list(found["a"]) == [1, "1", None] and found["pairs"] == {"tensor": 1}
    assert torch.equal(found["a"][1], tensors[0])
    assert torch.equal(found["a"]["1"], tensors[1])
    assert found["b"][:5] == state["b"][:5] and found["b"][5][1] == {}
    assert torch.equal(found["b"][5][0], tensors[2])


def test_two_names_of_one_weight_are_saved_once(settings):
    """GPT-2's embedding is its vocabulary projection, too."""
    policy = started(settings).go(until=2).parts["policy"]
    lm = policy.lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    names = list(load_file(settings.folder / "ppo.safetensors"))
    saved = [name for name in names if name.startswith("state.parts.policy.")]
    assert len(saved) == len(list(policy.parameters()))
    reloaded = Run(settings).parts["policy"].lm
    weights = (reloaded.get_output_embeddings(), reloaded.get_input_embeddings())
    assert weights[0].weight is weights[1].weight


def train_to_the_end(settings):
    torch.set_num_threads(1)
    started(settings).go()


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_where_it_would_have(settings, whole, survived):
    """`kill -9` again and again, and each time on from the checkpoint.

    Each run is killed a random moment after it began; when it has got to its end the
    result must be, to the last bit, that of the run that nobody killed.
    """
    settings = dataclasses.replace(settings, checkpoint_every=1)
    file = settings.folder / "ppo.safetensors"
    rng, fork = random.Random(0), multiprocessing.get_context("fork")
    kills = finished = 0
    reached = set()
    while finished < 5 and kills < 200:
        process = fork.Process(target=train_to_the_end, args=(settings,))
        process.start()
        process.join(0.15 * rng.random() * (1 + kills / 20))  # a moment, and then
        process.kill()
        process.join()
        kills += process.exitcode == -9
        if file.exists():
            _, state = read_state(file)
            reached.add(len(state["records"][0]))
            if len(state["records"][0]) == settings.ppo_steps:
                same(Run(settings), whole)
                file.unlink()
                finished += 1
        assert not list(settings.folder.glob("*.aside-*"))
    assert finished == 5 <= kills and len(reached) >= 3
    survived(
        f"kill -9 while PPO trains and saves, {kills} times",
        f"{finished} runs, each to the last bit the one that was not killed",
    )


def write_for_ever(path):
    torch.set_num_threads(1)
    number = 0
    while True:
        number += 1
        tensors = {str(i): torch.full((200_000,), float(number)) for i in range(3)}
        write_state(path, {}, {"number": number, "tensors": tensors})


@pytest.mark.slow
def test_killed_while_it_is_written_a_checkpoint_is_whole(tmp_path, survived):
    path = tmp_path / "ppo.safetensors"
    rng, fork = random.Random(0), multiprocessing.get_context("fork")
    write_state(path, {}, {"number": 0.0, "tensors": {}})
    kills, torn = 60, 0
    for _ in range(kills):
        process = fork.Process(target=write_for_ever, args=(path,))
        process.start()
        process.join(0.02 + 0.1 * rng.random())
        process.kill()
        process.join()
        torn += path.with_name(path.name + ".unfinished").exists()
        _, state = read_state(path)
        assert all((t == state["number"]).all() for t in state["tensors"].values())
    assert torn
    survived(
        f"kill -9 while a checkpoint is written, {kills} times",
        f"each time a whole one, the old or the new; {torn} died while writing",
    )
