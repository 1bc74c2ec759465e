"""Pictures: what can be wrong with them without anybody looking."""

import base64
import struct

import matplotlib
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from utils.support.notebook import ROOT

matplotlib.use("agg")

from utils import plots  # noqa: E402


def frontier(n):
    """Points that stand close together, as with beta 0 and a finished run."""
    generator = torch.Generator().manual_seed(n)

    def line(names):
        return [
            {"label": name, "kl": kl, "shares": {"a": share, "b": 1 - share}}
            for name, kl, share in zip(
                names,
                torch.rand(len(names), generator=generator).tolist(),
                (0.5 + 0.1 * torch.rand(len(names), generator=generator)).tolist(),
                strict=True,
            )
        ]

    return {
        "ppo": line(["1", "0.3", "0.1", "0.03", "0"]),
        "n": line("12468"),
        "run": line("x"),
    }


@pytest.mark.parametrize("n", range(5))
def test_no_label_of_the_frontier_hides_another_or_a_point(n):
    figure = plots.plot_frontier(frontier(n))
    for axis in figure.axes:
        labels = [text.get_window_extent() for text in axis.texts]
        assert len(labels) == 11
        for i, box in enumerate(labels):
            assert not any(box.overlaps(other) for other in labels[:i])
        points = [p for line in axis.lines for p in line.get_xydata()]
        for x, y in axis.transData.transform(points):
            assert not any(box.contains(x, y) for box in labels)


def test_the_frontier_of_several_runs_has_bars_as_wide_as_its_intervals():
    """Horizontal ones for the KL, vertical ones for the shares; none for one run."""
    place = {"label": "1", "kl": 2.0, "shares": {"a": 0.5, "b": 0.7}}
    bars = {"kl_95": 0.3, "shares_95": {"a": 0.1, "b": 0.2}}
    lines = {"ppo": [place | bars, place | bars | {"kl": 3.0}], "run": [place]}
    for axis, half in zip(plots.plot_frontier(lines).axes, (0.1, 0.2), strict=True):
        drawn = [c.get_segments() for c in axis.collections]
        widths = [ends[1] - ends[0] for bar in drawn for ends in bar]
        sizes = sorted(tuple(round(float(x), 6) for x in size) for size in widths)
        assert sizes == [(0, 2 * half)] * 2 + [(0.6, 0)] * 2


def test_every_curve_is_drawn_over_its_healthy_range():
    history = [{name: 0.01 * step for name, *_ in plots.CURVES} for step in range(5)]
    figure = plots.plot_ppo(history, history[:3])
    assert [axis.get_title() for axis in figure.axes] == [c[1] for c in plots.CURVES]
    for axis, (_, _, unit, healthy) in zip(figure.axes, plots.CURVES, strict=True):
        assert axis.get_ylabel() == unit
        assert len(axis.lines) == 2 and len(axis.patches) == (healthy is not None)
        low, high = axis.get_ylim()
        assert low <= 0 and high >= 0.04


@pytest.mark.parametrize("here", [0, 1, 2, 3])
def test_the_stages_mark_where_the_learner_is(here):
    figure = plots.plot_stages(here)
    boxes = [text.get_bbox_patch() for text in figure.axes[0].texts]
    marked = [b for b in boxes if b and b.get_facecolor()[:3] != (1.0, 1.0, 1.0)]
    assert len(marked) == {0: 0, 1: 1, 2: 1, 3: 4}[here]


def test_two_processes_meet_three_times():
    figure = plots.plot_two_processes()
    (axis,) = figure.axes
    assert len(axis.lines) == 3 and len(axis.patches) == 8
    for x in (line.get_xdata()[0] for line in axis.lines):
        for bar in axis.patches:  # nobody works while they meet
            assert not bar.get_x() < x < bar.get_x() + bar.get_width()


def test_the_clipped_loss_is_flat_where_there_is_no_reason_to_go_on():
    left, right = plots.plot_clipping(0.2).axes
    for axis, flat in ((left, lambda x: x > 1.2), (right, lambda x: x < 0.8)):
        _, clipped = axis.lines[:2]
        x, y = (torch.as_tensor(v) for v in clipped.get_data())
        assert y[flat(x)].std() < 1e-6
        assert y[~flat(x)].std() > 0.1


def test_a_picture_in_a_notebook_is_sharp_and_has_words():
    """In a real kernel, beside the picture that Jupyter would make of it itself."""
    source = "from utils.plots import plot_rewards\nfigure = plot_rewards([0.5], [0.7])"
    notebook = new_notebook(cells=[new_code_cell(source)])
    path = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=None, resources=path).execute()
    (output,) = notebook.cells[0].outputs
    shown = output.metadata["image/png"]
    assert shown["alt"].startswith("Rewards of the same prompts' responses before")
    picture = base64.b64decode(output.data["image/png"])
    size = struct.unpack(">II", picture[16:24])  # PNG, 11.2.1
    assert size == (1200, 600) and shown["width"] == 600  # 6 by 3 inches of 100 dots


def test_what_was_steered_stands_in_the_order_that_was_given():
    figure = plots.plot_steered([" dull", " a", " witty"], [-2.0, 0.0, 1.5])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        " dull",
        " a",
        " witty",
    ]
    assert [bar.get_width() for bar in axis.patches] == [-2.0, 0.0, 1.5]
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in axis.patches]
    assert colours == [plots.RED, plots.RED, plots.BLUE]


def test_the_learning_curve_shows_means_seeds_and_ceiling():
    agreement = {"50": [0.5, 0.52], "1000": [0.6, 0.7]}
    figure = plots.plot_learning_curve(agreement, [0.71, 0.73], [0.7, 0.7])
    (axis,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert list(lines["the best any model can"]) == pytest.approx([0.72, 0.72])
    assert list(lines["learnt from labels"]) == pytest.approx([0.7, 0.7])
    (band,) = axis.containers
    assert list(band.lines[0].get_ydata()) == pytest.approx([0.51, 0.65])
    assert [x.get_text() for x in axis.get_xticklabels()] == ["50", "1,000"]


def test_what_dpo_shows_is_in_nats_and_the_kl_where_it_was_measured():
    step = {"accuracy": 0.5, "margin": 0.3}
    step |= {"chosen_reward": -0.2, "rejected_reward": -0.5}
    history = [dict(step) for _ in range(4)]
    history[3]["kl"] = 0.7
    figure = plots.plot_dpo(history, beta=0.1)
    chosen, rejected, _ = figure.axes[2].lines
    assert list(chosen.get_ydata()) == pytest.approx([-2.0] * 4)
    assert list(rejected.get_ydata()) == pytest.approx([-5.0] * 4)
    assert figure.axes[3].lines[0].get_xydata().tolist() == [[0.0, 0.0], [3.0, 0.7]]


def test_a_learning_curve_of_one_seed_has_no_band():
    figure = plots.plot_learning_curve({"50": [0.5], "200": [0.6]}, [0.7], [0.7])
    (band,) = figure.axes[0].containers
    assert list(band.lines[0].get_ydata()) == pytest.approx([0.5, 0.6])
    (bars,) = band.lines[2]
    for low, high in (segment[:, 1] for segment in bars.get_segments()):
        assert low == high


def test_a_race_shows_means_and_no_kl_below_zero():
    found = {"score": [[0.0, 1.0], [0.0, 3.0]], "kl": [[0.0, 1.0], [0.0, 2.0]]}
    found["score"] += 3 * [[0.0, 2.0]]
    found["kl"] += 3 * [[0.0, 1.5]]
    names = ("REINFORCE", "RLOO", "GRPO", "PPO")
    score, kl = plots.plot_race(dict.fromkeys(names, found)).axes
    assert [line.get_label() for line in score.lines] == list(names)
    assert score.lines[0].get_ydata().tolist() == [0.0, 2.0]
    # 2.776 s / sqrt(5), where s is sqrt(2 / 4)
    top = score.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(2 + 2.776 * (1 / 2) ** 0.5 / 5**0.5, abs=1e-3)
    assert kl.get_ylim()[0] == 0 and kl.lines[3].get_ydata()[1] == 1.5


def test_a_race_of_two_seeds_shows_both_instead_of_a_band():
    found = {"score": [[0.0, 1.0], [0.0, 3.0]], "kl": [[0.0, 1.0], [0.0, 2.0]]}
    score, _ = plots.plot_race({"shaped": found, "PPO": found}).axes
    assert not score.collections
    shown = [line.get_ydata().tolist() for line in score.lines]
    assert shown == 2 * [[0.0, 2.0], [0.0, 1.0], [0.0, 3.0]]
    assert [text.get_text() for text in score.get_legend().texts] == ["shaped", "PPO"]
