"""The tools that run the series over several seeds, with the runs pretended."""

import json
import os
import re
import statistics
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from practice import tiny_world
from tools import expected, real_run
from utils.__main__ import parse
from utils.models import load_causal_lm
from utils.runs import NOTEBOOKS, STAGES
from utils.settings import load_settings

LINKS = "[a](utils/x.py), [b](https://b.c), [d](#d)"
FIGURES_OF = dict(zip(STAGES, ("validation_perplexity", "accuracy", "kl"), strict=True))


class Pretended:
    """Runs that write what a run writes; `asked` are stages and their settings."""

    def __init__(self, root):
        self.root, self.asked = root, []

    def __call__(self, command, *_, **__):
        made, _ = parse(command[3:])
        for file, (_, settings) in made.items():
            stage = STAGES[int(file.name[0]) - 1]
            self.asked.append((stage, settings))
            folder = self.root / settings.folder
            (folder / stage).mkdir(parents=True)
            says = f"*The outputs on this page are of {settings.seed}.*\n\n{LINKS}"
            streams = [
                new_output("stream", name=where, text=where)
                for where in ("stdout", "stderr")
            ]
            cells = [new_markdown_cell(says), new_code_cell("x](y)", outputs=streams)]
            nbformat.write(new_notebook(cells=cells), folder / file.name)
            figure = FIGURES_OF[stage]
            metrics = {"before": {}, "after": {figure: settings.seed / 2}}
            if stage == "policy":
                steps = [{"approx_kl": 0.25, "optimizer_steps": n} for n in (3, 1, 4)]
                metrics |= {"before": {figure: 1.0}, "history": steps}
            (folder / stage / "metrics.json").write_text(json.dumps(metrics))
        return 0, {"seconds": 1.0, "peak_gib": 2.0}


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    runs = Pretended(tmp_path)
    monkeypatch.setattr(real_run, "ROOT", tmp_path)
    monkeypatch.setattr(real_run, "run_measured", runs)
    return runs


def test_each_seed_is_run_once_and_collected(pretended, tmp_path):
    asked = pretended.asked
    arguments = ["some/model", "--seeds", "2", "--set", "train_rows=100"]
    real_run.main(arguments)
    wanted = {"model_name": "some/model", "train_rows": 100}
    expected = [
        (stage, load_settings("full", wanted | own))
        for seed in (42, 43)
        for own in [{"seed": seed, "runs_dir": f"runs/real-run/{seed}"}]
        for stage in STAGES
    ]
    assert asked == expected
    folder = tmp_path / "docs/real-run"
    found = json.loads((folder / "results.json").read_text())
    assert found["seeds"] == [42, 43]
    assert found["changes"] == ["model_name=some/model", "train_rows=100"]
    assert found["figures"] == {
        "validation_perplexity": {"after": [21.0, 21.5]},
        "accuracy": {"after": [21.0, 21.5]},
        "kl": {"before": [1.0, 1.0], "after": [21.0, 21.5]},
    }
    assert found["first_approx_kl"] == [0.25, 0.25]
    assert found["ended_early"] == [2, 2]  # of 2 epochs of 128 / 64
    assert found["seconds"] == dict.fromkeys(STAGES, [1, 1])
    page = (folder / "README.md").read_text()
    assert "on SST-2. Seeds: 2; of" in page
    assert "| SFT: validation perplexity |  | 21.25 (21.00 to 21.50) |" in page
    kl = "| KL to the reference [nats per response] | 1.00 | 21.25 (21.00 to 21.50) |"
    assert kl in page
    assert "policy by 0.250 nats" in page and "ended early: 4." in page
    command = "    python -m tools.real_run some/model --seeds 2 --set train_rows=100\n"
    assert page.endswith(command)
    for number in "123":
        first, second = nbformat.read(folder / NOTEBOOKS[number], 4).cells
        assert first.source == (
            f"*A real model's run, by `{command.strip()}`.*\n\n"
            "[a](../../utils/x.py), [b](https://b.c), [d](#d)"
        )
        assert second.source == "x](y)"
        assert [output.text for output in second.outputs] == ["stdout"]
    # what is there is not run again, what is not whole is
    real_run.main(arguments)
    assert len(asked) == 6
    (tmp_path / "runs/real-run/43/full/sft-cost.json").unlink()
    (tmp_path / "runs/real-run/43/full/sft/metrics.json").unlink()
    (tmp_path / "runs/real-run/43/full/sft").rmdir()
    real_run.main(arguments)
    assert len(asked) == 7 and asked[-1] == expected[3]
    # and nothing is reported of a run with other settings
    with pytest.raises(SystemExit, match="was made with .*train_rows=100.* delete"):
        real_run.main([*arguments[:-1], "train_rows=200"])
    assert len(asked) == 7


def test_the_reward_model_learns_from_fewer_phrases_too(pretended, tmp_path):
    arguments = ["some/model", "--seeds", "1", "--set", "train_rows=100", "--curve"]
    real_run.main([*arguments, "25,5000,0"])
    for asked, rows in zip(pretended.asked[3:], (25, 5000, 0), strict=True):
        own = {"runs_dir": f"runs/real-run/42-{rows}", "train_rows": rows}
        settings = load_settings("full", {"model_name": "some/model", **own})
        assert asked == ("reward_model", settings)
    folder = tmp_path / "docs/real-run"
    found = json.loads((folder / "results.json").read_text())
    assert found["curve"] == {"25": 21.0, "5000": 21.0, "0": 21.0}
    page = (folder / "README.md").read_text()
    assert "2100.0% from 25, 2100.0% from 5,000, 2100.0% from all." in page
    assert "some/model --seeds 1 --curve 25,5000,0 --set train_rows=100\n" in page


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["m", "--seeds", "0"], "got --seeds 0"),
        (["m", "--set", "train_row=5"], "the nearest is 'train_rows'"),
        (["m", "--set", "train_rows=many"], "must be a whole number, got 'many'"),
        (["m", "--set", "ppo_episodes=100"], "must be a multiple of ppo_rollout_size"),
        (["m", "--curve", "10,x"], "must be a whole number, got 'x'"),
        (["m", "--curve", "10,-1"], "train_rows must be .*, got -1"),
        (["m", "--set", "seed=42"], "--set cannot change seed"),
    ],
)
def test_what_cannot_be_run_is_said_before(pretended, capsys, arguments, says):
    with pytest.raises(SystemExit):
        real_run.main(arguments)
    assert re.search(says, capsys.readouterr().err) and not pretended.asked


def test_a_notebook_that_fails_ends_it(pretended, monkeypatch):
    monkeypatch.setattr(real_run, "run_measured", lambda *_: (1, {}))
    with pytest.raises(SystemExit, match="seed 42 stopped in notebook 1"):
        real_run.main(["m"])


def test_what_a_run_took_is_measured():
    """That of its children too: one that holds a GiB and computes for a while."""
    code = "import time; x = b'x' * 2**30; t = time.process_time()\n"
    code += "while time.process_time() - t < 0.3: pass\n"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    failed, spent = real_run.run_measured([sys.executable, "-c", nested])
    assert not failed and 1 <= spent["peak_gib"] < 1.1
    assert spent["seconds"] >= 0.3
    failed, _ = real_run.run_measured([sys.executable, "-c", "raise SystemExit(3)"])
    assert failed == 3


def test_a_seed_of_the_tiny_preset_is_run_where_it_stopped(
    world, tmp_path, monkeypatch
):
    """With the preset's own settings, a model of its own, and none of it twice."""
    runs = Pretended(tmp_path)
    done = SimpleNamespace(returncode=0)
    monkeypatch.setitem(tiny_world.PRETRAINING, "steps", 1)
    monkeypatch.setattr(expected.tiny_world, "build_world", lambda folder: world)
    run = lambda command, **_: (runs(command), done)[1]  # noqa: E731
    monkeypatch.setattr(expected.subprocess, "run", run)
    figures = {"validation_perplexity": 1.5, "accuracy": 1.5, "kl": 1.5}
    assert expected.measure(tmp_path, 3) == figures
    own = load_settings("tiny", {"seed": 3, "runs_dir": str(tmp_path / "3")})
    assert runs.asked == [(stage, own) for stage in STAGES]
    mine, others = (load_causal_lm(str(x)) for x in (own.model_name, world / "model"))
    assert mine.config.vocab_size == others.config.vocab_size
    assert not mine.lm_head.weight.equal(others.lm_head.weight)
    (own.folder / "policy/metrics.json").unlink()
    (own.folder / "policy").rmdir()
    assert expected.measure(tmp_path, 3) == figures
    assert runs.asked[3:] == [("policy", own)]
    (own.folder / "policy/metrics.json").unlink()
    done.returncode, done.stderr = 1, "KeyError: the cause"
    (own.folder / "policy").rmdir()
    monkeypatch.setattr(expected.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="(?s)seed 3 failed.*KeyError: the cause"):
        expected.measure(tmp_path, 3)


def test_mean_and_deviation_over_the_seeds(tmp_path, monkeypatch, capsys):
    class Pool:
        """One process is enough."""

        def __init__(self, **options):
            assert options["max_workers"] == 2

        def __enter__(self):
            return SimpleNamespace(map=map)

        def __exit__(self, *_):
            """Nothing is left."""

    def measure(runs, seed):
        assert expected.os.environ["OMP_NUM_THREADS"] == "1"
        return {"kl": [1.0, 3.0][seed], "length": 7.0}

    monkeypatch.setattr(expected, "FILE", tmp_path / "expected.json")
    monkeypatch.setattr(expected, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(expected, "measure", measure)
    monkeypatch.setattr(expected.os, "environ", dict(os.environ))
    expected.main(["--seeds", "2"])
    assert json.loads((tmp_path / "expected.json").read_text()) == {
        "command": "python -m tools.expected --seeds 2",
        "seeds": 2,
        "figures": {"kl": [2.0, statistics.stdev([1, 3])], "length": [7.0, 0.0]},
    }
    with pytest.raises(SystemExit):
        expected.main(["--seeds", "1"])
    assert "got --seeds 1" in capsys.readouterr().err


def test_an_edit_of_a_lesson_begins_the_runs_anew(monkeypatch):
    before, read = expected.folder_of_runs(), nbformat.read

    def edited(*arguments, **options):
        notebook = read(*arguments, **options)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source += "\npass"
        return notebook

    assert expected.folder_of_runs() == before
    monkeypatch.setattr(expected.nbformat, "read", edited)
    assert expected.folder_of_runs() != before
