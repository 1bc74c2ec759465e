"""Signs that PPO will learn nothing: before it starts, and while it runs.

Nothing of this is an error of the code. The preflight stops at what `outlook` says,
and starts all the same with the setting `train_anyway`; between the rollouts of
notebook 3 `Watch` calls `say_new_signs`. (Elsewhere it would be a false alarm: the best
policy of an exact world does repeat one text.)
"""

import json
import math
from collections import Counter
from pathlib import Path

from tqdm import tqdm

ONE_SIDED = 2.33  # standard deviations that chance exceeds once in a hundred
# Fewer, and most responses get the same fixed score, whatever they say; and the scale
# of the scores was measured on unfinished texts, which the reward model never saw.
LEAST_ENDED = 0.5
MANY_EMPTY = 0.5  # worth a line
# That many empty, or one and the same: no choice is left that a score could rank
NEARLY_ALL = 0.9
ANYWAY = (
    "to start all the same, add {'train_anyway': 1} to CHANGES in the first cell, and "
    "run on from there"
)


def chance_accuracy(baseline: float, n: int) -> float:
    """The highest accuracy on `n` rows that mere chance explains, once in a hundred.

    For whoever is right with the probability `baseline`. What lies above it has a
    lower bound above the baseline: that of the score interval (Wilson 1927, "Probable
    inference, the law of succession, and statistical inference"), one-sided.
    """
    return baseline + ONE_SIDED * math.sqrt(baseline * (1 - baseline) / n)


def _accuracy(folder, settings):
    file = Path(folder) / "metrics.json"
    metrics = json.loads(file.read_text()) if file.exists() else {}
    accuracy = metrics.get("after", {}).get("accuracy")
    baseline, n = metrics.get("baseline"), metrics.get("validation_rows")
    if None in (accuracy, baseline, n):
        return None, (
            f"{file} has no accuracy, baseline and validation_rows to compare; "
            "notebook 2 writes them when it is run again"
        )
    bound = chance_accuracy(baseline, n)
    remedy = f"train it on more data, with another seed or rm_lr ({settings.rm_lr})"
    if bound >= 1:
        remedy = f"{n} rows are too few to tell; raise validation_share, or name a "
        remedy += "larger validation_split"
    return accuracy > bound, (
        f"the reward model is right on {accuracy:.1%} of {n:,} validation rows, and "
        f"always guessing their more frequent label on {baseline:.1%}; only above "
        f"{min(bound, 1):.1%} is it more than chance; {remedy}"
    )


def _ended(share, settings):
    return share >= LEAST_ENDED, (
        f"only {share:.1%} of the SFT model's responses end in EOS, and any other gets "
        f"the score {settings.missing_eos_score:g} whatever it says; raise "
        f"max_new_tokens ({settings.max_new_tokens}), or train the SFT model for more "
        f"sft_epochs ({settings.sft_epochs}), on texts that close with EOS"
    )


def _empty(share, settings):
    good = None if MANY_EMPTY < share <= NEARLY_ALL else share <= NEARLY_ALL
    return good, (
        f"{share:.1%} of the SFT model's responses are empty, EOS at once; train it "
        f"on longer texts (sft_min_tokens, {settings.sft_min_tokens}), for more "
        f"sft_epochs ({settings.sft_epochs}), or lower prompt_max_tokens "
        f"({settings.prompt_max_tokens})"
    )


def _alike(share, settings):
    return share <= NEARLY_ALL, (
        f"{share:.1%} of the SFT model's responses are one and the same; train it on "
        f"texts that differ more, or with a lower sft_lr ({settings.sft_lr})"
    )


def outlook(sft_responses: list[list[int]], reward_folder, eos_id: int, settings):
    """What PPO needs in order to learn: a dict from what holds to (good, remedy).

    `sft_responses` are token ids, EOS included, and `reward_folder` is the reward
    model's, with its `metrics.json`. `good` is None for what is only worth knowing.
    """
    n = len(sft_responses)
    ended = sum(row[-1] == eos_id for row in sft_responses) / n
    counts = Counter(map(tuple, sft_responses))
    empty = counts.pop((eos_id,), 0) / n
    alike = max(counts.values(), default=0) / n
    return {
        "the reward model was better than guessing": _accuracy(reward_folder, settings),
        f"SFT responses end in EOS ({ended:.1%})": _ended(ended, settings),
        f"few of them are empty ({empty:.1%})": _empty(empty, settings),
        f"they differ (the most frequent: {alike:.1%})": _alike(alike, settings),
    }


WINDOW, LONG = 3, 10  # [rollouts]; single ones go astray in a healthy run, too
WATCHED = {"eos_rate", "empty", "different", "kl", "entropy", "approx_kl"}
WATCHED |= {"explained_variance"}


def _signs(history):
    """What the last rollouts show, by the row of the glossary that has the remedy."""
    first = history[0]  # written by the SFT model itself
    some = history[-WINDOW:]
    last = {name: sum(row[name] for row in some) / len(some) for name in WATCHED}
    eos, was = last["eos_rate"], first["eos_rate"]
    empty, different = last["empty"], last["different"]
    # The value head starts from zeros, and a few rollouts do not tell
    foreseen = max(row["explained_variance"] for row in history[-LONG:])
    signs = {
        "EOS rate": (eos < was - 0.2, f"{eos:.0%} end in EOS, at first {was:.0%}"),
        "empty responses": (empty > 0.5, f"{empty:.0%} are empty, EOS at once"),
        "different responses": (
            different < min(0.1, first["different"] / 2),
            f"only {different:.0%} differ, at first {first['different']:.0%}",
        ),
        "KL to the reference": (last["kl"] > 40, f"{last['kl']:.0f} nats"),
        "entropy": (last["entropy"] < 0.1, f"{last['entropy']:.2f} nats, nearly none"),
        "approx_kl": (last["approx_kl"] > 0.1, f"{last['approx_kl']:.2f} an update"),
        "explained variance": (
            len(history) >= LONG and foreseen < -0.2,
            f"below {foreseen:.2f} for {LONG} rollouts",
        ),
    }
    return {row: said for row, (fires, said) in signs.items() if fires}


def new_signs(history: list[dict], said: list[str]) -> list[str]:
    """Lines for what the last rollouts show and what is not yet in `said`.

    `history` has the figures of each rollout, those of `summarise` in notebook 3; if
    it is another's, which lacks some of them, nothing is said. Rows of the glossary
    that are said now are added to `said`, which a checkpoint keeps, so that each is
    said once in a run.
    """
    n = len(history)
    known = n >= WINDOW and all(row.keys() >= WATCHED for row in history)
    signs = _signs(history) if known else {}
    new = [row for row in signs if row not in said]
    said += new
    return [f"rollout {n}, {row}: {signs[row]}; see the glossary below" for row in new]


def say_new_signs(run):
    """Print what a run of PPO shows and has not said yet, beside its progress bar."""
    for line in new_signs(run.history, run.said):
        tqdm.write(line)
