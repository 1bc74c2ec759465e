"""Two processes do what one does: gradients, decisions and records are everybody's."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import processes_at_work as work
from utils.processes import own_share
from utils.rollout import Rollout
from utils.support.notebook import LOOP, ROOT, import_cells

accelerate = pytest.importorskip(
    "accelerate", reason="several processes need accelerate"
)


@pytest.fixture(scope="module")
def rollout():
    return work.make_rollout(import_cells("3-RLHF.ipynb", *LOOP))


@pytest.fixture(scope="module")
def alone(rollout, tmp_path_factory):
    return work.measure(rollout, tmp_path_factory.mktemp("alone"))


ENGINES = {"DDP": "ddp.yaml", "FSDP2": "fsdp2.yaml"}
PARAMETERS = ["DDP", pytest.param("FSDP2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PARAMETERS)
def two(rollout, tmp_path_factory, request):
    """What each of two processes found, which accelerate started."""
    folder = tmp_path_factory.mktemp("processes")
    given = {k: x for k, x in vars(rollout).items() if x is not None}
    torch.save(given, folder / "rollout.pt")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [f"more/accelerate/{ENGINES[request.param]}", "--main_process_port", "0"]
    launch += ["--module", "tests.processes_at_work", str(folder)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(launch, cwd=ROOT, env=env, check=True, timeout=300)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    found[0]["folder"] = folder
    return found


def test_the_rows_are_shared_out_once(monkeypatch):
    for n, rows in ((1, 5), (2, 5), (3, 2), (4, 16)):
        monkeypatch.setattr("utils.processes.n_processes", lambda n=n: n)
        found = []
        for rank in range(n):
            monkeypatch.setattr("utils.processes.this_process", lambda r=rank: r)
            found.append(list(range(rows))[own_share(rows)])
        assert sum(found, []) == list(range(rows))
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_the_gradients_are_those_of_one_process(alone, two, rollout):
    lengths = [rollout.mask[work.ROWS][rows].sum() for rows in (slice(5), slice(5, 11))]
    assert abs(lengths[0] / lengths[1] - 1) > 0.2  # the mean of two means is another
    for found in two:
        for name, expected in alone["gradients"].items():
            difference = (found["gradients"][name] - expected).norm()
            assert difference <= 1e-6 * expected.norm(), name


def test_an_adapters_gradients_are_those_of_one_process(alone, two):
    for found in two:
        if not found["adapters"]:
            pytest.skip("an adapter on weights that are divided is another matter")
        assert found["adapters"]["moved"] == [] and found["adapters"]["off"] == 0
        for name, expected in alone["adapters"]["gradients"].items():
            difference = (found["adapters"]["gradients"][name] - expected).norm()
            assert difference <= 1e-6 * expected.norm(), name


def test_the_figures_are_those_of_one_process(alone, two):
    for found in two:
        assert found["figures"].keys() == alone["figures"].keys()
        for name, expected in alone["figures"].items():
            assert found["figures"][name].item() == pytest.approx(
                expected.item(), rel=1e-5, abs=1e-7
            ), name


def test_what_one_process_saw_stops_both(alone, two):
    assert alone["stops"]["steps"] == 1  # of three epochs with two minibatches each
    for found in two:
        assert found["stops"]["steps"] == alone["stops"]["steps"]
        torch.testing.assert_close(
            found["stops"]["kl"], alone["stops"]["kl"], rtol=1e-5, atol=1e-7
        )


def test_both_have_the_same_run(two):
    first, second = (found["run"] for found in two)
    assert first["history"] == second["history"] and len(first["history"]) == 2
    assert torch.equal(first["generator"], second["generator"])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_a_rollout_has_the_same_prompts_and_everybodys_responses(alone, two):
    found = [run["run"]["rollouts"] for run in (alone, *two)]
    for before, one, other in zip(*found, strict=True):
        for name, x in one.items():
            assert torch.equal(x, other[name]), name
        width = before["input_ids"].shape[1] - before["mask"].shape[1]
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(before[name][:, :width], one[name][:, :width])
        half = len(one["mask"]) // 2  # each draws its own, not the other's again
        assert not torch.equal(one["input_ids"][:half], one["input_ids"][half:])


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(x)), name


def test_a_run_of_two_processes_goes_on_in_two_and_in_one(two):
    run = two[0]["run"]
    for found in two:
        same(found["run"]["restored"], run["weights"])
        before, after = found["run"]["moments"]
        for i, moments in before.items():
            same(after[i], moments)
    again, weights = work.restored(
        import_cells("3-RLHF.ipynb", *LOOP), two[0]["folder"]
    )
    same(weights, run["weights"])
    assert again.history == run["history"]
    assert torch.equal(again.generator.get_state(), run["generator"])
    for i, moments in again.optimizer.state_dict()["optimizer"]["state"].items():
        same(moments, run["moments"][0][i])


def test_the_artefact_is_a_whole_model(two):
    folder = two[0]["folder"] / "tiny" / "policy"
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in two[0]["run"]["weights"].items():
        if name.startswith("lm."):
            assert torch.equal(found[name.removeprefix("lm.")], weight), name


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["rows", "sums"])
def test_shared_functions_give_what_one_process_finds(alone, two, kind, n):
    expected = alone["shared"][kind, n]
    gradient = sum(found["shared"][kind, n]["gradient"] for found in two)
    torch.testing.assert_close(gradient, expected["gradient"])
    for found in two:
        value = found["shared"][kind, n]["value"]
        if kind == "rows":
            torch.testing.assert_close(value, expected["value"])
        else:
            assert value[0].item() == pytest.approx(expected["value"][0].item())
            assert value[1].item() == n


def test_rollouts_are_joined_as_they_were_sampled(rollout):
    """Of parts that are narrower on both sides, the padding aside."""
    widths = rollout.input_ids.shape[1] - rollout.mask.shape[1]

    def cut(rows):
        part = rollout.rows(torch.tensor(rows))
        right = int(part.mask.sum(1).max()) - part.mask.shape[1] or None
        left = widths - int(part.attention_mask[:, :widths].sum(1).max())
        for name in ("input_ids", "attention_mask"):
            setattr(part, name, getattr(part, name)[:, left:right])
        for name, x in vars(part).items():
            if (
                x is not None
                and x.dim() == 2
                and name
                not in (
                    "input_ids",
                    "attention_mask",
                )
            ):
                setattr(part, name, x[:, :right])
        return part

    short = [i for i in range(len(rollout)) if rollout.mask[i].sum() < 4][:3]
    rest = [i for i in range(len(rollout)) if i not in short]
    whole = Rollout.joined(
        [cut(short), rollout.rows(torch.tensor([]).long()), cut(rest)]
    )
    expected = rollout.rows(torch.tensor(short + rest))
    for name, x in vars(expected).items():
        if x is not None:
            assert torch.equal(getattr(whole, name), x), name
