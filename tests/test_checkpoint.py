"""The state of a PPO run on disk: complete, never torn, and never another run's."""

import contextlib
import copy
import dataclasses
import json
import multiprocessing
import random

import nbformat
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import needs_posix
from tests.test_loop import SETTINGS as LOOP_SETTINGS
from tests.test_loop import score
from tests.test_rollout import EOS, PROMPTS, small_lm
from utils.models import freeze
from utils.support.checkpoint import Checkpoint, read_state, write_state
from utils.support.notebook import LOOP, ROOT, import_cells

pytestmark = pytest.mark.faults
SETTINGS = dataclasses.replace(LOOP_SETTINGS, ppo_episodes=144, checkpoint_every=2)


class Started:
    """What the cells `start` and `loop` of notebook 3 do, for a very small model."""

    def __init__(self, settings, loop=None, code=(), **inputs):
        self.loop = loop or import_cells("3-RLHF.ipynb", *LOOP)
        self.settings = settings
        lm = small_lm().float()
        self.reference = freeze(copy.deepcopy(lm))
        self.run = self.loop["fresh_run"](lm, settings)
        # on a CPU too, so that there is something to lose
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)
        self.run.optimizer.scaler = scaler
        self.how = (self.loop["ppo_advantages"], self.loop["ppo_update"])
        code = (self.loop["fresh_run"], self.loop["train"], *self.how, *code)
        inputs = {"reference": self.reference, "prompts": PROMPTS, **inputs}
        self.checkpoint = Checkpoint(self.run, settings, code, inputs)
        self.checkpoint.restore()

    @property
    def history(self):
        return self.run.history

    def go(self, until=None):
        """Train to the end, or until so many rollouts are done."""

        class Stop(Exception):
            pass

        def pause(step):
            if step and step not in self.run.snapshots:
                # the states of the other random generators matter to the result, too
                noise = random.random() + torch.rand(()).item()
                self.run.snapshots[step] = (noise, [{"text": "é"}])
            self.checkpoint.save()
            if step == until:
                raise Stop

        with contextlib.suppress(Stop):
            self.checkpoint.check(self.settings)
            models = (self.reference, score, lambda step: PROMPTS * 8, EOS)
            self.loop["train"](self.run, *models, self.settings, *self.how, pause)
        return self


def started(settings, **options):
    random.seed(1)
    torch.manual_seed(1)
    return Started(settings, **options)


@pytest.fixture
def settings(tmp_path):
    return dataclasses.replace(SETTINGS, runs_dir=str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    runs = tmp_path_factory.mktemp("whole")
    return started(dataclasses.replace(SETTINGS, runs_dir=str(runs))).go()


def said_by_now(capsys):
    """The lines printed since the last call, without progress bars."""
    lines = capsys.readouterr().out.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith(("PPO", "("))]


def same(one, other):
    """The same run, to the last bit, but for the seconds that it took."""
    assert len(one.history) == 6
    for name, part in vars(one.run).items():
        parts = (part, getattr(other.run, name))
        if isinstance(part, torch.nn.Module):
            parts = tuple(dict(part.named_parameters()) for part in parts)
        elif isinstance(part, torch.Generator):
            parts = tuple(part.get_state() for part in parts)
        elif hasattr(part, "state_dict"):
            parts = tuple(part.state_dict() for part in parts)
        if name != "seconds":
            a, b = (json.dumps(part, default=lambda x: x.tolist()) for part in parts)
            assert a == b, name


@pytest.mark.parametrize("rollouts, saved", [(2, 2), (3, 2), (5, 4), (6, 6)])
def test_an_interrupted_run_ends_where_it_would_have(
    settings, whole, capsys, rollouts, saved
):
    started(settings).go(until=rollouts)
    random.seed(99)  # a new process draws otherwise
    torch.manual_seed(99)
    run = Started(settings)
    assert f"goes on after {saved} of 6 rollouts" in capsys.readouterr().out
    assert len(run.history) == saved
    assert list(run.run.snapshots) == list(range(1, saved + 1))
    same(run.go(), whole)


def test_nothing_is_saved_before_it_is_time(settings, capsys):
    started(settings).go(until=1)
    assert not list(settings.folder.glob("*"))
    place = settings.folder / "ppo.safetensors"
    assert said_by_now(capsys) == [
        f"PPO begins, and is saved every 2 rollouts to {place}"
    ]


def test_the_last_rollout_is_saved_whatever_its_number(settings):
    settings = dataclasses.replace(settings, checkpoint_every=4)
    started(settings).go()
    assert len(Started(settings).history) == 6


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
        ({"ppo_lr": 0.5}, {}, "had ppo_lr 0.0003 instead of 0.5"),
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
        ({}, {"code": (score,)}, "another score"),
        ({"ppo_episodes": 24}, {}, "ppo_episodes 144 instead of 24"),
        # another precision, as that of another machine may be next time
        ({"precision": "bfloat16"}, {}, "dtype 'torch.float32' instead of 'torch.bf"),
    ],
)
def test_another_runs_checkpoint_is_named_and_set_aside(
    settings, capsys, survived, changes, options, says
):
    started(settings).go(until=2)
    content = (settings.folder / "ppo.safetensors").read_bytes()
    run = started(dataclasses.replace(settings, **changes), **options)
    said = said_by_now(capsys)[-1]
    assert run.history == [] and said.startswith("PPO begins anew")
    assert says in said and said.endswith("; renamed to ppo.safetensors.aside-1")
    assert (settings.folder / "ppo.safetensors.aside-1").read_bytes() == content
    for weight, first in zip(
        run.run.policy.lm.parameters(), run.reference.parameters(), strict=True
    ):
        assert torch.equal(weight, first)
    survived("checkpoint of another run", said)


def test_a_setting_that_changes_nothing_does_not_matter(settings, whole):
    started(settings).go(until=2)
    changes = {"frontier_rollouts": 3, "best_of_n": 2, "checkpoint_every": 3}
    lower = dataclasses.replace(settings, ppo_micro_batch_size=4)  # after a full GPU
    assert len(Started(lower).history) == 2
    same(Started(dataclasses.replace(settings, **changes)).go(), whole)


def test_a_run_from_before_a_setting_existed_goes_on(settings):
    started(settings).go(until=2)
    path = settings.folder / "ppo.safetensors"
    key, state = read_state(path)
    del key["settings"]["text_column"]
    write_state(path, key, state)
    assert len(Started(settings).history) == 2
    assert Started(dataclasses.replace(settings, text_column="x")).history == []


def test_an_unfinished_run_is_kept_though_another_would_be_finished(settings, capsys):
    """Four of six rollouts are all that there is, also for a run of four."""
    started(settings).go(until=4)
    started(dataclasses.replace(settings, ppo_episodes=96))
    said = said_by_now(capsys)[-1]
    assert said.endswith("instead of 96; renamed to ppo.safetensors.aside-1")


def test_nothing_is_written_twice(settings):
    run = started(settings).go(until=2)
    file = settings.folder / "ppo.safetensors"
    written = file.stat().st_mtime_ns
    again = Started(settings)
    again.checkpoint.save()
    run.checkpoint.save()
    assert file.stat().st_mtime_ns == written


def test_a_finished_run_of_other_settings_is_replaced(settings, capsys):
    started(settings).go()
    started(dataclasses.replace(settings, kl_coef=0.5)).go()
    said = said_by_now(capsys)[-1]
    assert said.endswith("had kl_coef 0.1 instead of 0.5")
    assert [p.name for p in settings.folder.iterdir()] == ["ppo.safetensors"]


FORMULAS = (
    "token_rewards",
    "compute_gae",
    "masked_whiten",
    "policy_loss",
    "value_loss",
    "kl_estimate",
    "explained_variance",
)
PARTS = ("sample_responses", "evaluate_responses", "response_logprobs", "has_ended")


@pytest.mark.parametrize("name", (*FORMULAS, *PARTS))
def test_a_formula_written_anew_after_a_finished_run_counts(
    settings, whole, capsys, survived, name
):
    """It is named, PPO begins anew, and the figures are others."""
    started(settings).go()
    edited = import_cells("3-RLHF.ipynb", *LOOP)
    real = edited[name]

    def wrong(*arguments, **options):
        found = real(*arguments, **options)
        if isinstance(found, tuple):
            return (found[0] * 2, *found[1:])
        return ~found if found.dtype == torch.bool else found * 1.5

    edited[name] = wrong
    if name == "sample_responses":  # the tokens must be tokens
        edited[name] = lambda *arguments: real(*arguments[:5], 2.0, *arguments[6:])
    run = started(settings, loop=edited)
    said = said_by_now(capsys)[-1]
    assert said.startswith("PPO begins anew") and f"had another {name}" in said
    assert run.history == []
    assert run.go().history != whole.history
    survived(f"{name} written anew after a finished run", said)


def test_a_function_written_anew_under_a_run_is_noticed(settings, survived):
    """Interrupted, a formula redefined in a new cell, and the loop's cell run again."""
    run = started(settings).go(until=3)
    run.loop["masked_whiten"] = lambda x, mask: x * 0
    with pytest.raises(RuntimeError, match="began with another masked_whiten; r") as e:
        run.go()
    assert len(run.history) == 3
    del run.loop["masked_whiten"]
    run.loop["masked_whiten"] = import_cells("3-RLHF.ipynb")["masked_whiten"]
    run.checkpoint.check(run.settings)
    run.settings = dataclasses.replace(run.settings, kl_coef=0.7)
    with pytest.raises(RuntimeError, match="began with kl_coef 0.1 instead of 0.7"):
        run.go()
    run.settings = settings
    for weight in run.reference.parameters():
        weight.neg_()
    with pytest.raises(RuntimeError, match="began with another reference; run"):
        run.go()
    survived("masked_whiten written anew, and the loop goes on", str(e.value))


def test_a_comment_and_a_docstring_are_no_edit(settings):
    started(settings).go(until=2)
    source = source_of("ppo-advantages").replace("# 1.", "\n    # First,")
    source = source.replace('"""The rollout with', '"""A rollout with')
    edited = import_cells("3-RLHF.ipynb", *LOOP)
    exec(source, edited)
    assert len(started(settings, loop=edited).history) == 2
    exec(source.replace("settings.gamma", "0.5"), edited)
    assert started(settings, loop=edited).history == []


def source_of(cell_id):
    cells = nbformat.read(ROOT / "3-RLHF.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.id == cell_id)
    return source


def foreign(path):
    save_file({"w": torch.ones(3)}, path)


def of_an_older_version(path):
    """As the file was before the run was one object."""
    header = {"kind": "state of a PPO run", "key": "{}", "state": "{}"}
    save_file({"w": torch.ones(3)}, path, metadata=header)


SPOILED = {
    "of an older version": of_an_older_version,
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
    begins, renamed = said_by_now(capsys)[-2:]
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
    same(Started(settings), whole)
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
    policy = started(settings).go(until=2).run.policy
    lm = policy.lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    names = list(load_file(settings.folder / "ppo.safetensors"))
    saved = [name for name in names if name.startswith("state.run.policy.")]
    assert len(saved) == len(list(policy.parameters()))
    reloaded = Started(settings).run.policy.lm
    weights = (reloaded.get_output_embeddings(), reloaded.get_input_embeddings())
    assert weights[0].weight is weights[1].weight


def train_to_the_end(settings):
    torch.set_num_threads(1)
    started(settings).go()


@needs_posix
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
            done = len(state["run"]["history"])
            reached.add(done)
            if done == settings.ppo_steps:
                same(Started(settings), whole)
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


@needs_posix
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
