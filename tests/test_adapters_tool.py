"""The tools that measure adapters, with runs that are pretended, or tiny."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from tools import adapters, real_adapters
from tools.real_run import RUNS
from utils.settings import FULL, TINY

COST = {"changes": ["model_name=some/model", "train_rows=100"], "peak_gib": 9.0}
SAID = {
    "--seed 7": "there is no runs/real-run/7/full/policy-cost.json; run python -m",
    "--set ppo_episode=1": "the nearest is 'ppo_episodes'",
    "--set ppo_episodes=100": "must be a multiple of ppo_rollout_size",
    "": "it stopped in the stage reward, see above",
}


def test_three_seeds_of_each_are_run_and_none_twice(tmp_path, monkeypatch):
    asked, path, limit = [], tmp_path / adapters.RESULTS, [4]

    def measure(three, eight, layout, rank, seed):
        if len(asked) in limit:
            raise KeyboardInterrupt(limit.pop())
        asked.append((layout, rank, seed))
        return {"share": rank + seed / 1e6, "score": seed / 3}

    models = None, SimpleNamespace(accuracies={"on-the-sft-model": 0.123456})
    monkeypatch.setattr(adapters, "lessons", lambda: models)
    monkeypatch.setattr(adapters, "measure", measure)
    monkeypatch.setattr(adapters, "ROOT", tmp_path)
    path.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        adapters.main([])
    for _ in range(2):
        adapters.main([])
        assert asked == [(*way, seed) for way in adapters.RACED for seed in (0, 1, 2)]
    found = json.loads(path.read_text())
    assert found["reward accuracy"]["on-the-sft-model"] == 0.1235
    assert found["layouts"]["layout 3, rank 1"]["score"] == [0.0, 0.3333, 0.6667]


def test_both_differ_in_nothing_but_their_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_adapters, "ROOT", tmp_path)
    monkeypatch.setattr(real_adapters, "run_measured", lambda *_: (1, {}))
    cost = tmp_path / RUNS / "42/full/policy-cost.json"
    cost.parent.mkdir(parents=True)
    cost.write_text(json.dumps(COST))
    theirs, ours = real_adapters.settings_of(42, ["ppo_episodes=256"])
    assert theirs.model_name == "some/model" and theirs.train_rows == 100
    assert theirs.folder == RUNS / "42/full" and ours.ppo_lr == 10 * FULL.ppo_lr
    other = [name for name, x in vars(ours).items() if x != vars(theirs)[name]]
    assert other == ["rm_lr", "ppo_episodes", "ppo_lr", "runs_dir"]
    for arguments, says in SAID.items():
        with pytest.raises(SystemExit) as ended:
            real_adapters.main(arguments.split())
        assert says in f"{ended.value} {capsys.readouterr().err}"


@pytest.mark.slow
def test_the_stages_train_one_base_once(series, tmp_path, monkeypatch):
    """For real, with few rollouts: nothing of the base moves."""
    theirs = dataclasses.replace(TINY, runs_dir=str(tmp_path))
    few = {"runs_dir": str(tmp_path / "ours"), "ppo_episodes": 512}
    ours, done = dataclasses.replace(theirs, **few), []
    shutil.copytree(series[0], theirs.folder)
    (theirs.folder / "policy-cost.json").write_text(json.dumps(COST))

    def run_measured(command, environment):
        done.append(command[command.index("--stage") + 1])
        real_adapters.STAGES[done[-1]](theirs, ours, torch.device("cpu"))
        return 0, {"seconds": 7.0, "peak_gib": 3.0}

    results = tmp_path / "adapters.json"
    monkeypatch.setattr(real_adapters, "RESULTS", results)
    monkeypatch.setattr(real_adapters, "run_measured", run_measured)
    monkeypatch.setattr(real_adapters, "settings_of", lambda *_: (theirs, ours))
    for _ in range(2):  # what is there is not done again
        real_adapters.main([])
        assert done == ["reward", "policy", "judge"]
    found = json.loads(results.read_text())
    assert found["accuracy"] > 0.8 and found["full"]["accuracy"] > 0.99
    assert (found["moved"], found["episodes"]) == (0, 512)
    assert found["history"]["kl"][0] == 0
    before, after, full = found["before"], found["after"], found["full"]["before"]
    assert before["kl"] == 0 != after["kl"]
    price = after["score"] - after["objective"]
    assert price == pytest.approx(theirs.kl_coef * after["kl"], abs=1e-3)
    assert before["score"] == pytest.approx(full["score"], abs=1e-4)
    assert found["cost"]["judge"]["peak_gib"] == 3 and found["full"]["peak_gib"] == 9
