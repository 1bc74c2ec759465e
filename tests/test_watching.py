"""Watching a run: what arrives at a tracker, and that nothing does unasked."""

import dataclasses
import math
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from utils.settings import TINY
from utils.support import watching
from utils.support.watching import Watch, check_tracker

ROWS = [{"prompt": "the | film", "response": " is\nfine", "reward": 0.5, "text": "x"}]


class Run:
    """A run of PPO of three rollouts, of which so many are done."""

    def __init__(self, done):
        self.history = [
            {"score": 0.1 * i, "kl": math.pi * i, "ratio_max": 1e6 + i}
            for i in range(done)
        ]
        self.said = []
        self.snapshots = {step: ({"kl": 0.0}, ROWS) for step in (0, 3) if step <= done}


def settings(tmp_path, log_to):
    rollouts = {"ppo_episodes": 3 * TINY.ppo_rollout_size}
    return dataclasses.replace(TINY, runs_dir=str(tmp_path), log_to=log_to, **rollouts)


def test_tensorboards_files_hold_the_history(tmp_path):
    """Read back with TensorBoard's own reader; the numbers are 32 bits there."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    watch = Watch(settings(tmp_path, "tensorboard"))
    for done in (0, 1, 3, 3):  # the loop's cell run a second time adds nothing
        watch.look(Run(done))
    (folder,) = (tmp_path / "tiny" / "log").iterdir()
    (_,) = folder.iterdir()
    found = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    history = Run(3).history
    read = {
        name: [(e.step, e.tensor_proto.float_val[0]) for e in found.Tensors(name)]
        for name in history[0]
    }
    for name, events in read.items():
        assert [step for step, _ in events] == [1, 2, 3]
        for (_, value), row in zip(events, history, strict=True):
            assert value == pytest.approx(row[name], rel=1e-7)
    texts = found.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 3]
    said = texts[0].tensor_proto.string_val[0].decode()
    assert said.splitlines()[2] == "| the \\| film |  is fine | 0.50 |"


@pytest.fixture
def library(monkeypatch):
    """A module in the place of wandb or trackio that remembers how it was called."""
    calls = []

    def remember(name):
        return lambda *args, **options: calls.append((name, args, options))

    def use(name):
        fake = types.ModuleType(name)
        fake.__spec__ = types.SimpleNamespace()
        fake.Table = lambda dataframe: dataframe.to_dict("split", index=False)
        for function in ("init", "log", "finish"):
            setattr(fake, function, remember(function))
        monkeypatch.setitem(sys.modules, name, fake)
        return calls

    return use


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_same_under_the_same_names(tmp_path, library, name):
    calls = library(name)
    watch = Watch(settings(tmp_path, name))
    assert calls == []  # nothing is begun before there is something to say
    for done in (0, 2, 3, 3):
        watch.look(Run(done))
    (_, _, begun), *logged, ended = calls
    assert begun["project"] == "rlhf-notebooks" and begun["name"].startswith("tiny-")
    assert begun["config"]["kl_coef"] == TINY.kl_coef
    # No text of the settings, which may be a folder of this machine
    assert not [v for v in begun["config"].values() if isinstance(v, str)]
    assert ended[0] == "finish"
    figures = [(args[0], o["step"]) for _, args, o in logged if "kl" in args[0]]
    assert figures == [(row, i + 1) for i, row in enumerate(Run(3).history)]
    columns = ["prompt", "response", "reward"]
    table = {"columns": columns, "data": [["the | film", " is\nfine", 0.5]]}
    texts = [(args[0], o["step"]) for _, args, o in logged if "kl" not in args[0]]
    assert texts == [({"samples": table}, 0), ({"samples": table}, 3)]


def test_a_run_that_goes_on_sends_its_figures_from_the_beginning(tmp_path, library):
    calls = library("wandb")
    Watch(settings(tmp_path, "wandb")).look(Run(2))
    assert [o["step"] for name, _, o in calls if name == "log"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = f"^log_to is '{name}', which is not installed; run `pip install {name}`, or "
    for refuses in (check_tracker, Watch):
        with pytest.raises(ModuleNotFoundError, match=said):
            refuses(settings(tmp_path, name))


def test_nothing_is_written_or_sent_unless_asked(tmp_path, library):
    calls = [library(name) for name in ("wandb", "trackio")]
    watch = Watch(settings(tmp_path, ""))
    for done in (0, 3):
        watch.look(Run(done))
    assert calls == [[], []] and not list(tmp_path.rglob("*"))


class Shown:
    """What is displayed, and displayed in its place."""

    def __init__(self):
        self.first, self.updates = [], []

    def display(self, data, **options):
        assert options["raw"] and options["display_id"] and options["metadata"]
        self.first.append(data)
        return self

    def update(self, data, raw, metadata=None):
        self.updates.append(data)


@pytest.mark.parametrize("there", [True, False])
def test_live_curves_are_one_picture_that_is_gone_at_the_end(
    tmp_path, monkeypatch, there
):
    shown, now = Shown(), [0.0]
    monkeypatch.setattr(watching, "display", shown.display)
    monkeypatch.setattr(watching, "somebody_is_there", lambda: there)
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    drawn, open_before = [], plt.get_fignums()

    def plot(history):
        drawn.append(len(history))
        picture = plt.figure()
        picture.as_png = lambda: ({"image/png": "x"}, {"alt": "y"})
        now[0] += 2  # a slow machine: then it waits 40 seconds, not 10
        return picture

    monkeypatch.setattr(watching, "plot_ppo", plot)
    watch = Watch(settings(tmp_path, ""))
    for seconds, done in ((0, 2), (11, 1), (12, 2), (25, 2), (50, 2), (60, 2), (95, 3)):
        now[0] = max(now[0], seconds)
        watch.look(Run(done))
    assert len(drawn) == (2 if there else 0)
    assert len(shown.first) == there
    assert plt.get_fignums() == open_before  # the cell's end shows none of them again
    assert shown.updates == (
        [{"image/png": "x"}, {"text/plain": "(the curves are below)"}] if there else []
    )


def test_wandb_offline_works(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    watch = Watch(settings(tmp_path, "wandb"))
    for done in (0, 3):
        watch.look(Run(done))
    wandb.teardown()  # ends its own process, which writes the file
    (file,) = tmp_path.rglob("*.wandb")
    assert file.stat().st_size > 1000  # its own format; what it gets is tested above


def test_trackio_writes_to_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at the import
    pytest.importorskip("trackio", reason="pip install trackio")
    watch = Watch(settings(tmp_path, "trackio"))
    for done in (0, 3):
        watch.look(Run(done))
    assert [f for f in Path(tmp_path / "trackio").rglob("*") if f.is_file()]
