"""Whether PPO can learn: what the preflight stops, and what the loop warns of."""

import contextlib
import copy
import dataclasses
import json
import math
import re

import nbformat
import pytest
import torch

from tests.test_loop import SETTINGS, small_run
from tests.test_preflight import check, healthy
from tests.test_rollout import EOS, PROMPTS, small_lm
from utils.models import RewardModel, freeze
from utils.rollout import response_tokens, score_scale
from utils.support.checkpoint import Checkpoint
from utils.support.learning import chance_accuracy, new_signs, say_new_signs
from utils.support.notebook import LOOP, ROOT, import_cells


def eos_more_likely(lm, by):
    """The model with EOS's logit raised by about so much, after any text."""
    lm = copy.deepcopy(lm)
    direction = lm.get_output_embeddings().weight[EOS]
    with torch.no_grad():
        lm.base_model.ln_f.bias += by * direction / direction.norm() ** 2
    return lm


def score_cell(lm, reward_model):
    """What the cell of notebook 3 measures on an SFT model's responses."""
    names = {
        "settings": dataclasses.replace(SETTINGS, normalise_samples=60),
        "device": torch.device("cpu"),
        "train_prompts": PROMPTS * 20,
        "eos_id": EOS,
        "reference": lm,
        "reward_model": reward_model,
    }
    return import_cells("3-RLHF.ipynb", "score", names=names)


def answers(lm):
    return score_cell(lm, reward_model())["sft_responses"]


def reward_model(weight=1.0, bias=0.0):
    """A small one, with a head that is so many times a random one."""
    model = freeze(RewardModel(small_lm(seed=2).base_model).float())
    model.head.weight.data *= weight
    model.head.bias.data += bias
    return model


def measured(accuracy, baseline=0.5, n=800):
    return {"after": {"accuracy": accuracy}, "baseline": baseline, "validation_rows": n}


def write_metrics(start, metrics):
    (start.reward_folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def start(tmp_path):
    """A healthy start of PPO, with a reward model that was measured."""
    return healthy(tmp_path)


def test_the_tokens_of_a_response_end_with_its_eos():
    ids = torch.tensor([[7, 3, EOS, EOS], [7, EOS, EOS, EOS], [7, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    assert response_tokens(ids, mask) == [[3, EOS], [EOS], [3, 4, 5]]


def test_chance_ends_where_wilsons_interval_begins():
    """The interval as books print it, of an accuracy at the bound."""
    for baseline, n in ((0.5, 800), (0.9, 50), (0.51, 872)):
        p, z = chance_accuracy(baseline, n), 2.33
        spread = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        low = (p + z**2 / (2 * n) - spread) / (1 + z**2 / n)
        assert low == pytest.approx(baseline, abs=1e-9)


def test_who_guesses_passes_once_in_a_hundred_times():
    right = sum(
        math.comb(800, k) for k in range(801) if k / 800 > chance_accuracy(0.5, 800)
    )
    assert 0.005 < right / 2**800 < 0.015


def guesses(start):
    write_metrics(start, measured(0.52))


def guesses_the_frequent_label(start):
    """Right on 90 %, as everybody who never looks at the text."""
    write_metrics(start, measured(0.9, baseline=0.9))


def few_rows(start):
    write_metrics(start, measured(1.0, baseline=0.6, n=3))


def hardly_a_response_ends(start):
    start.sft_responses = answers(eos_more_likely(small_lm(), -30))


def eos_at_once(start):
    start.sft_responses = answers(eos_more_likely(small_lm(), 30))


def all_alike(start):
    start.sft_responses = [[3, 4, EOS]] * 60 + [[3, EOS]] * 4


HOPELESS = {
    guesses: r"right on 52.0% of 800 validation rows.*label on 50.0%; only above 54.1%"
    r".*train it on more data, with another seed or rm_lr \(0.001\)",
    guesses_the_frequent_label: "right on 90.0% of 800.*on 90.0%; only above 92.5%",
    few_rows: "on 100.0% of 3 validation rows.*3 rows are too few to tell; raise val",
    hardly_a_response_ends: r"only \d\.\d% of the SFT model's responses end in EOS.*the"
    r" score -2 .*raise max_new_tokens \(6\), or .*sft_epochs \(1\)",
    eos_at_once: r"100.0% of the SFT model's responses are empty, EOS at once; train it"
    r".*\(sft_min_tokens, 5\).*sft_epochs \(1\)",
    all_alike: "93.8% of the SFT model's responses are one and the same; train it on",
}


@pytest.mark.parametrize("spoil", HOPELESS)
def test_what_cannot_learn_is_stopped(spoil, start, capsys):
    """In one sentence: what, with its figures, the remedies, how to go on anyway."""
    spoil(start)
    with pytest.raises(RuntimeError, match=HOPELESS[spoil]) as caught:
        check(start)
    said = str(caught.value)
    assert said.startswith("PPO would not learn: ") and "\n" not in said
    assert "to start all the same, add {'train_anyway': 1} to CHANGES" in said
    out = capsys.readouterr().out
    assert out.count("✗ ") == 1 and out.count("✓ ") == 12


@pytest.mark.parametrize("spoil", HOPELESS)
def test_it_starts_all_the_same_for_whoever_asks(spoil, start, capsys):
    spoil(start)
    start.settings = dataclasses.replace(start.settings, train_anyway=1)
    check(start)
    out = capsys.readouterr().out
    assert out.count("✗ ") == 1 and out.endswith("since train_anyway is set\n")


def test_nobody_may_ask_to_start_with_a_mistake(start):
    guesses(start)
    start.settings = dataclasses.replace(start.settings, train_anyway=1)
    start.policy.train()
    with pytest.raises(RuntimeError, match="go wrong: training mode.*right on 52.0%"):
        check(start)


@pytest.mark.parametrize("metrics", [{}, {"after": {"accuracy": 0.51}}, None])
def test_an_older_reward_model_is_not_judged(metrics, start, capsys):
    write_metrics(start, metrics)
    if metrics is None:
        (start.reward_folder / "metrics.json").unlink()
    check(start)
    said = capsys.readouterr().out
    assert (
        "– " in said and "baseline and validation_rows to compare; notebook 2" in said
    )


def test_notebook_2_writes_what_is_compared():
    """The names, in its save cell."""
    cells = nbformat.read(ROOT / "2-RM Training.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.id == "save")
    names, found = ("model", "tokenizer", "before", "after", "baseline", "rows"), {}
    values = dict.fromkeys(names) | {"rows": {"validation": [1, 2, 3]}, "baseline": 0.6}
    values |= {"save_artefact": lambda *a: found.update(a[-1]), "settings": None}
    source = source.partition("reloaded")[0].partition("\n\n")[2]
    exec(source, values)
    assert (found["baseline"], found["validation_rows"]) == (0.6, 3)


@pytest.mark.parametrize("empty, mark", [(6, "✓"), (38, "–"), (60, "✗")])
def test_the_share_of_empty_responses_is_said(empty, mark, start, capsys):
    """Of 64; more than half are worth a line, nearly all end it."""
    start.sft_responses[:empty] = [[EOS]] * empty
    with contextlib.suppress(RuntimeError):
        check(start)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "empty" in line)
    assert line[0] == mark and f"{empty / 64:.1%}" in line


def test_the_shares_of_a_healthy_model_are_printed(start, capsys):
    start.sft_responses = [[3, i, EOS] for i in range(1, 9)] * 8 + [[3, 4]] * 16
    check(start)
    out = capsys.readouterr().out
    assert "✓ SFT responses end in EOS (80.0%)" in out
    assert "✓ few of them are empty (0.0%)" in out
    assert "✓ they differ (the most frequent: 20.0%)" in out


def test_a_reward_model_that_says_the_same_gives_no_scale():
    said = r"says the same to 60 SFT responses: raw scores around 3 with a spread of .*"
    said += "rounding in float32; train it on more data, with another seed or rm_lr"
    for weight, spread in ((0, "0e"), (1e-6, "2e-07")):
        with pytest.raises(ValueError, match=said) as caught:
            score_cell(small_lm().float(), reward_model(weight, bias=3.0))
        assert f"spread of {spread}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_small_spread_is_a_scale_if_it_is_no_rounding():
    """Scores of 1e-9 around 0 are as exact as those of 1."""
    found = score_cell(small_lm().float(), reward_model(1e-9))
    assert 1e-11 < found["score_std"] < 1e-7


def test_half_precision_has_a_coarser_rounding():
    raw = 3 + 0.003 * torch.linspace(-1, 1, 64)
    mean, std = score_scale(raw, torch.float32)
    assert mean == pytest.approx(3) and std == pytest.approx(raw.std().item())
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"rounding in {str(dtype)[6:]}"):
            score_scale(raw, dtype)
        assert score_scale(20 * (raw - 3) + 3, dtype)


def test_a_score_that_is_no_number_gives_no_scale():
    raw = torch.tensor([0.1, float("nan"), 0.3])
    with pytest.raises(ValueError, match=r"gives 1 of 3 SFT resp.*\(nan\); set"):
        score_scale(raw, torch.float32)
    with pytest.raises(ValueError, match="says the same to 1 SFT responses"):
        score_scale(raw[:1], torch.float32)


HEALTHY = {
    "eos_rate": 0.95,
    "empty": 0.02,
    "different": 0.9,
    "kl": 3.0,
    "entropy": 1.2,
    "approx_kl": 0.01,
    "explained_variance": -0.1,
}


def said_of(history):
    """What is said after each rollout, where something is."""
    said, lines = [], {}
    for n in range(len(history) + 1):
        if new := new_signs(history[:n], said):
            lines[n] = new
    return lines


def test_nothing_is_said_of_a_healthy_history():
    assert said_of([HEALTHY] * 40) == {}


@pytest.mark.parametrize(
    "name, value, row, rollout",
    [
        # ten healthy rollouts, and then this; said when the mean of three is beyond
        ("eos_rate", 0.7, "EOS rate", 13),
        ("empty", 1.0, "empty responses", 12),
        ("different", 0.02, "different responses", 13),
        ("kl", 300.0, "KL to the reference", 11),
        ("kl", 45.0, "KL to the reference", 13),
        ("entropy", 0.01, "entropy", 13),
        ("approx_kl", 0.12, "approx_kl", 13),
        # this one when it was so for ten
        ("explained_variance", -0.3, "explained variance", 20),
    ],
)
def test_each_sign_is_said_once_with_its_row(name, value, row, rollout):
    history = [HEALTHY] * 10 + [{**HEALTHY, name: value}] * 15
    history += [HEALTHY] * 10 + [{**HEALTHY, name: value}] * 15
    ((when, (line,)),) = said_of(history).items()
    assert when == rollout
    assert line.startswith(f"rollout {rollout}, {row}: ")
    assert line.endswith("; see the glossary below")


def test_a_single_rollout_is_no_sign():
    """Each figure at a value that would be one, if it lasted."""
    odd = {"eos_rate": 0.5, "empty": 0.9, "different": 0.05, "kl": 80.0}
    odd |= {"entropy": 0.0, "approx_kl": 0.2, "explained_variance": -5.0}
    for name, value in odd.items():
        history = [HEALTHY] * 10 + [{**HEALTHY, name: value}] + [HEALTHY] * 10
        assert said_of(history) == {}, name


def test_a_world_of_one_prompt_repeats_itself_from_the_start():
    history = [{**HEALTHY, "different": 0.06}] * 10
    assert said_of(history) == {}


def test_a_value_head_may_need_a_few_rollouts():
    history = [{**HEALTHY, "explained_variance": -0.5}] * 12
    assert list(said_of(history)) == [10]


def test_figures_of_ones_own_are_let_be():
    history = [{"kl": 300.0, "score": 0.1}] * 5
    assert said_of(history) == {}


@pytest.fixture(scope="module")
def loop():
    return import_cells("3-RLHF.ipynb", *LOOP)


def train(loop, run, models, settings):
    """PPO to its end, with the signs beside it, as in the cell `snapshot`."""
    how = (loop["ppo_advantages"], loop["ppo_update"])
    loop["train"](run, *models, settings, *how, lambda step: say_new_signs(run))


def rows_said(capsys):
    said = capsys.readouterr().out.replace(
        "\r", "\n"
    )  # of the bar that it stands beside
    return re.findall(r"^rollout \d+, (.+?): ", said, re.M)


def test_a_run_that_learns_says_nothing(loop, capsys):
    run, models, settings = small_run(loop, kl_coef=0.1)
    train(loop, run, models, settings)
    assert len(run.history) == 25 and rows_said(capsys) == [] == run.said


def test_a_run_without_a_price_that_leaps_says_so(loop, capsys):
    run, models, settings = small_run(loop, kl_coef=0.0)
    settings = dataclasses.replace(settings, ppo_lr=0.3, ppo_warmup=0)
    run = loop["fresh_run"](small_lm(), settings)
    train(loop, run, models, settings)
    said = rows_said(capsys)
    assert {"approx_kl", "entropy", "different responses"} <= set(said)
    assert said == run.said and len(set(said)) == len(said)


def test_a_run_that_unlearns_to_end_says_so(loop, capsys):
    """A response that never ends is what pays most here."""
    run, models, settings = small_run(loop, kl_coef=0.0)

    def rambling_pays(ids, attention, mask):
        raw = mask.sum(dim=1).double()
        return raw, raw

    train(loop, run, (models[0], rambling_pays, *models[2:]), settings)
    assert run.history[-1]["eos_rate"] < run.history[0]["eos_rate"] - 0.2
    assert "EOS rate" in rows_said(capsys)


def test_a_run_that_learns_to_say_nothing_says_so(loop, capsys):
    run, models, settings = small_run(loop, kl_coef=0.0)

    def silence_pays(ids, attention, mask):
        raw = -mask.sum(dim=1).double()
        return raw, raw

    train(loop, run, (models[0], silence_pays, *models[2:]), settings)
    said = rows_said(capsys)
    assert {"empty responses", "different responses", "entropy"} <= set(said)


def test_a_run_that_goes_on_does_not_repeat_itself(loop, capsys, tmp_path):
    """Cut off after what there was to say, and taken up by another process."""
    _, models, settings = small_run(loop, kl_coef=0.0, checkpoint_every=1)
    settings = dataclasses.replace(settings, ppo_lr=0.3, runs_dir=str(tmp_path))

    class Stop(Exception):
        pass

    def go(until):
        run = loop["fresh_run"](small_lm(), settings)
        checkpoint = Checkpoint(run, settings, (loop["train"],), {})
        checkpoint.restore()

        def pause(step):
            say_new_signs(run)
            checkpoint.save()
            if step == until:
                raise Stop

        how = (loop["ppo_advantages"], loop["ppo_update"])
        with contextlib.suppress(Stop):
            loop["train"](run, *models, settings, *how, pause)
        return rows_said(capsys)

    first, then = go(12), go(25)
    assert "approx_kl" in first and then and not set(first) & set(then)


def test_the_glossary_has_a_remedy_in_every_row_and_a_row_for_every_sign():
    cells = nbformat.read(ROOT / "3-RLHF.ipynb", as_version=4).cells
    (text,) = (cell.source for cell in cells if cell.id == "glossary")
    lines = [line.strip("|").split("|") for line in text.splitlines() if "| " in line]
    rows = {cells[0].strip(): cells[3].strip() for cells in lines[1:]}
    assert len(rows) == 16
    assert all(len(remedy) > 10 for remedy in rows.values())
    worst = {"eos_rate": 0.0, "empty": 1.0, "different": 0.0, "kl": 99.0}
    worst |= {"entropy": 0.0, "approx_kl": 9.0, "explained_variance": -9.0}
    signs = []
    new_signs([HEALTHY] * 3 + [worst] * 10, signs)
    assert len(signs) == 7 and set(signs) <= set(rows)
