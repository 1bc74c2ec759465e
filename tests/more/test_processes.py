"""Two processes do what one does: gradients, decisions and records are everybody's."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import accelerate
import pytest
import torch

from more import processes
from tests.conftest import needs_posix
from tests.small import SETTINGS, collect, make_policy, score
from utils.models import freeze
from utils.rollout import evaluate_responses

ROWS = torch.tensor([7, 0, 3, 11, 20, 5, 14, 2, 9, 16, 1])  # eleven: not to be halved
# The first half of the prompts is narrower than the second
END = 9  # what closes them: not what other tensors are padded with
MIXED = [[3], [4, 2]] * 11 + [[5, 6, 7, 8], [3]]


@pytest.fixture(scope="module")
def rollout(loop):
    return collect(loop, make_policy().float(), freeze(make_policy().lm.float()))


def fresh(loop, settings=SETTINGS):
    """A run whose value head has learnt something."""
    policy = make_policy().float()
    run = loop["fresh_run"](policy.lm, settings)
    run.policy.value_head.load_state_dict(policy.value_head.state_dict())
    return run


def gradients(loop, rollout, work) -> dict:
    """Of PPO's loss on some rows, in pieces of four, and the figures of the loss."""
    settings = replace(SETTINGS, ppo_micro_batch_size=4)
    run = fresh(loop, settings)
    run.policy.lm.transformer.wpe.requires_grad_(False)  # as under an adapter
    with torch.no_grad():  # so that ratios differ from token to token
        run.policy.lm.transformer.wte.weight.mul_(1.5)
    figures = work(run.policy, run.optimizer, rollout.rows(ROWS), settings)
    weights = [pair for pair in run.policy.named_parameters() if pair[1].requires_grad]
    return {"figures": figures, "gradients": {n: p.grad for n, p in weights}}


def whole_run(loop, work) -> dict:
    """Two rollouts and updates, by notebook 3's `train`."""
    run, seen, second = fresh(loop), [], accelerate.PartialState().process_index

    def drawn(*given):  # the first one's responses are shorter
        *given, settings, generator = given
        settings = replace(settings, max_new_tokens=6 if second else 3)
        return loop["collect_rollout"](*given, settings, generator)

    def advantages(rollout, *options):
        seen.append({k: x for k, x in vars(rollout).items() if x is not None})
        return loop["ppo_advantages"](rollout, *options)

    given = freeze(make_policy().lm.float()), score, lambda step: MIXED, END, SETTINGS
    together = partial(processes.collect_together, drawn)
    update = partial(loop["ppo_update"], backward=work)
    loop["train"](run, *given, advantages, update, collect=together)
    state = run.policy.state_dict() | {"generator": run.generator.get_state()}
    return {"history": run.history, "rollouts": seen, "state": state}


def in_each(folder, loop, rollout):
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate takes more
    accelerate.PartialState._reset_state()  # of an earlier test
    state = accelerate.PartialState(cpu=True)
    work = partial(processes.gradients_together, loop["gradients"])
    found = gradients(loop, rollout, work)
    found["run"] = whole_run(loop, work)
    torch.save(found, folder / f"{state.process_index}.pt")


@pytest.fixture(scope="module")
def two(loop, rollout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    accelerate.debug_launcher(in_each, (folder, loop, rollout), num_processes=2)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in (0, 1)]


@needs_posix
def test_the_gradients_are_those_of_one_process(loop, rollout, two):
    lengths = rollout.mask[ROWS].sum(dim=1).sort().values
    assert abs(lengths[::2].sum() / lengths[1::2].sum() - 1) > 0.1  # not weighed alike
    alone = gradients(loop, rollout, loop["gradients"])
    assert alone["figures"]["ratio_max"] > 1.2
    for found in two:
        near = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}
        torch.testing.assert_close(found["figures"], alone["figures"], **near)
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            off = found["gradients"][name] - expected
            assert off.norm() <= 1e-6 * expected.norm(), name


@needs_posix
def test_both_have_the_same_run(two):
    first, second = (found["run"] for found in two)
    assert len(first["history"]) == 2
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@needs_posix
def test_a_rollout_has_all_prompts_and_everybodys_responses(loop, two):
    rollout = SimpleNamespace(**two[0]["run"]["rollouts"][0])
    width = rollout.input_ids.shape[1] - rollout.mask.shape[1]
    assert width == max(map(len, MIXED))
    for prompt, row, real in zip(
        MIXED, rollout.input_ids, rollout.attention_mask, strict=True
    ):
        assert row[:width][real[:width].bool()].tolist() == prompt
    responses = rollout.input_ids[:, width:]
    assert (responses[~rollout.mask.bool()] == END).all()
    assert not torch.equal(responses[:10], responses[12:22])  # each draws its own
    texts = rollout.input_ids, rollout.attention_mask, rollout.mask
    with torch.no_grad():  # as they were scored, side by side
        logprobs, values = evaluate_responses(fresh(loop).policy, *texts)
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(rollout.old_logprobs, logprobs, **near)
    torch.testing.assert_close(rollout.old_values, values, **near)
    assert torch.equal(rollout.raw_scores, score(*texts)[0])


@pytest.mark.parametrize(
    "words, gpus, said",
    [
        ("--processes 2 --set device=cpu", 1, "sft is not there: run notebook 1"),
        ("--processes 2", 2, "sft is not there: run notebook 1"),
        ("--processes 4", 2, "4 processes on 2 GPUs; start 2, or set device=cpu"),
        ("--processes 0", 0, "divide ppo_minibatch_size (64), which 0 does not"),
        ("--processes 64", 0, "64 processes on 3 cores; start as many"),
    ],
)
def test_processes_that_cannot_be_started(monkeypatch, capsys, words, gpus, said):
    """One sentence; what can be started is only told that there are no models."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    with pytest.raises(SystemExit):
        processes.main([*words.split(), "--set", "runs_dir=none", "--preset", "tiny"])
    assert said in capsys.readouterr().err
