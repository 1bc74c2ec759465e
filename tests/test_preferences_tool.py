"""The tool that measures learning from pairs, with the runs pretended."""

import json
from types import SimpleNamespace

import pytest
import torch

from tools import preferences
from utils.settings import TINY


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Stages whose result is their seed; the seeds that were asked for, by stage."""
    asked = {name: [] for name in preferences.STAGES}

    def stage(name):
        def run(seed):
            asked[name].append(seed)
            return {"agreement": {"50": seed / 3}, "ceiling": seed}

        return run

    def in_parallel(jobs, title, tasks):
        assert jobs == 2 and title in asked
        return {key: task(*arguments) for key, (task, *arguments) in tasks.items()}

    stages = {name: (stage(name), range(3)) for name in preferences.STAGES}
    monkeypatch.setattr(preferences, "STAGES", stages)
    monkeypatch.setattr(preferences, "in_parallel", in_parallel)
    monkeypatch.setattr(preferences, "find_artefacts", lambda *names: names)
    monkeypatch.setattr(preferences, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return asked


def test_each_stage_is_a_list_over_the_seeds(pretended, tmp_path):
    preferences.main(["--jobs", "2"])
    found = json.loads((tmp_path / preferences.RESULTS).read_text())
    expected = {"agreement": {"50": [0.0, 0.3333, 0.6667]}, "ceiling": [0, 1, 2]}
    assert found == dict.fromkeys(("exact", "curve"), expected)
    assert pretended == dict.fromkeys(pretended, [0, 1, 2])


def test_one_stage_leaves_the_others_as_they_were(pretended, tmp_path):
    path = tmp_path / preferences.RESULTS
    path.write_text('{"exact": "as it was"}')
    preferences.main(["--jobs", "2", "--only", "curve"])
    found = json.loads(path.read_text())
    assert found["exact"] == "as it was" and set(found) == {"exact", "curve"}
    assert pretended["exact"] == []


def test_what_cannot_be_run_is_said_before(pretended, capsys):
    for arguments, says in ((["--jobs", "0"], "got --jobs 0"), (["--only", "x"], "x")):
        with pytest.raises(SystemExit):
            preferences.main(arguments)
        assert says in capsys.readouterr().err
    assert pretended == dict.fromkeys(pretended, [])


def test_the_curve_ends_in_ppo_on_the_model_of_the_most_pairs(monkeypatch):
    """A model that has seen 4 pairs or fewer guesses; a better text is worth 3 nats."""
    learnt_from, ran = [], []

    def sample_pairs(lm, prompts, seed):
        assert (lm, seed) == ("the SFT model", 7)
        return [(prompt, " good", " bad") for prompt in prompts]

    def train_on_pairs(pairs, seed):
        learnt_from.append({pair["prompt"] for pair in pairs})
        model = torch.nn.Linear(1, 1)
        model.pairs = len(pairs)
        return model, []

    def score_texts(model, texts):
        assert not {text.split()[0] for text in texts} & set().union(*learnt_from)
        right = getattr(model, "pairs", 99) > 4
        return torch.tensor([float(right and "good" in text) for text in texts])

    def ppo_on(model, settings):
        ran.append((model.pairs, settings.seed, settings.ppo_episodes))
        assert not any(p.requires_grad for p in model.parameters())
        return SimpleNamespace(policy="the policy")

    def evaluate(policy, show_progress):
        assert policy == "the policy"
        return dict.fromkeys((*preferences.FIGURES, "length"), 0.5), []

    names = ("prompt", "chosen", "rejected")
    five = SimpleNamespace(
        sample_pairs=sample_pairs,
        label=lambda pairs, seed: [dict(zip(names, p, strict=True)) for p in pairs],
        both_texts=lambda pairs: [p["prompt"] + p[x] for p in pairs for x in names[1:]],
        utility=lambda texts: torch.tensor([3.0 * ("good" in text) for text in texts]),
        train_on_pairs=train_on_pairs,
        score_texts=score_texts,
        ppo_on=ppo_on,
        settings=TINY,
        lesson3=SimpleNamespace(
            reference="the SFT model",
            reward_model="that of notebook 2",
            train_prompts=[f"film-{i}" for i in range(40)],
            evaluate=evaluate,
        ),
    )
    monkeypatch.setattr(preferences, "lesson", lambda: five)
    monkeypatch.setattr(preferences, "SIZES", (4, 8, 16))
    found = preferences.curve(7)
    right = torch.sigmoid(torch.tensor(3.0)).item()
    assert found["agreement"] == pytest.approx({"4": 0.5, "8": right, "16": right})
    assert found["labels"] == found["ceiling"] == pytest.approx(right)
    assert [len(prompts) for prompts in learnt_from] == [4, 8, 16]
    assert ran == [(16, 7, TINY.ppo_episodes)]
    assert found["ppo"] == dict.fromkeys(preferences.FIGURES, 0.5)
