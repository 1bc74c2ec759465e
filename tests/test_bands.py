"""The expected bands, and how a run is held against them."""

import dataclasses
import json

import pytest

from utils.evaluation import FIGURES, figures_table
from utils.settings import FULL, TINY
from utils.support import bands
from utils.support.run import EARLIER_FIGURES


def test_the_bands_are_those_of_the_preset():
    found = bands.expected(TINY)
    kept = json.loads(bands.FILE.read_text())
    assert kept["seeds"] >= 10
    assert set(FIGURES) | set(EARLIER_FIGURES) <= set(found)
    assert bands.expected(dataclasses.replace(TINY, seed=7, runs_dir="x")) == found


def test_other_settings_have_no_bands():
    assert bands.expected(FULL) == {}
    assert bands.expected(dataclasses.replace(TINY, kl_coef=0.2)) == {}


def test_mean_and_deviation_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bands, "FILE", tmp_path / "bands.json")
    monkeypatch.setattr(bands, "ROOT", tmp_path)
    runs = {0: {"kl": 1.0, "length": 7.0}, 1: {"kl": 3.0, "length": 7.0}}
    monkeypatch.setattr(bands, "measure", lambda seed, keep: runs[seed])
    bands.main(["--seeds", "2"])
    assert bands.expected(TINY) == {
        "kl": (2.0, pytest.approx(2**0.5)),
        "length": (7, 0),
    }
    with pytest.raises(SystemExit):
        bands.main(["--seeds", "1"])
    assert "got --seeds 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kl, eos_rate, outside",
    [
        (2.9, 1.0, []),
        (3.1, 1.0, ["kl"]),
        (0.9, 1.0, ["kl"]),
        # one response of 256 without EOS is no news, two are
        (2.0, 255 / 256, []),
        (2.0, 254 / 256, ["eos_rate"]),
    ],
)
def test_what_lies_outside_is_marked(kl, eos_rate, outside):
    expected = {"kl": (2.0, 0.25), "eos_rate": (1.0, 0.0)}
    table = figures_table({}, {"kl": kl, "eos_rate": eos_rate}, expected)
    lines = dict(zip(("kl", "eos_rate"), table.splitlines()[1:], strict=True))
    assert "2.00 ± 1.00" in lines["kl"]
    assert [k for k, line in lines.items() if line.endswith("outside")] == outside
