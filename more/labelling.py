"""A person at work: which of two texts is better?

`Labeller` asks, takes an answer, and has it on disk before it asks again. It knows no
widget: `labelling_box` in `widgets.py` shows it with buttons and keys.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from more.preferences import append_pair, read_pairs, remove_pair

KEYS = ("1", "2", "s", "u")  # the left one, the right one, skip, undo


@dataclass(frozen=True)
class Question:
    """Two responses to a prompt, left and right; `again` if it was asked before."""

    prompt: str
    left: str
    right: str
    again: bool = False

    @property
    def key(self) -> tuple:
        """The same for a question however its sides stand."""
        return self.prompt, frozenset((self.left, self.right)), self.again


def make_questions(
    pairs: Iterable[tuple[str, str, str]], seed: int, every: int = 10
) -> list[Question]:
    """A question for each (prompt, one, other), the sides in random order.

    Every tenth (or `every`) question is an earlier one with its sides swapped, so that
    a labeller's consistency and bias for a side can be measured. No pair may come
    twice, nor be one text.
    """
    rng, questions, open_to_repeat = random.Random(seed), [], []
    for prompt, *texts in pairs:
        rng.shuffle(texts)
        questions.append(Question(prompt, *texts))
        open_to_repeat.append(questions[-1])
        if len(questions) % every == every - 1:
            some = open_to_repeat[:-1] or open_to_repeat  # not the one just asked
            first = some[rng.randrange(len(some))]
            open_to_repeat.remove(first)
            questions.append(Question(first.prompt, first.right, first.left, True))
    return questions


class Labeller:
    """Asks its questions in order, and has each answer on disk before the next.

    Answers go to `path` as pairs (JSON Lines of prompt, chosen, rejected), those to
    repeated questions to `<name>.again.jsonl`, and what was skipped, the left text
    first, to `<name>.skipped.jsonl`. A new `Labeller` with the same questions and path
    goes on where an earlier one stopped. `faults` says which lines it could not read.
    """

    def __init__(self, questions: list[Question], path):
        path, ends = Path(path), {"pairs": "", "again": ".again", "skip": ".skipped"}
        self.files = {k: path.with_suffix(x + ".jsonl") for k, x in ends.items()}
        self.questions, self.faults, found = questions, [], {}
        for kind, file in self.files.items():
            pairs, faults = read_pairs(file) if file.exists() else ([], [])
            self.faults += faults
            for pair in pairs:
                key = pair["prompt"], frozenset((pair["chosen"], pair["rejected"]))
                # Who skips what he has answered skips it when it comes again
                again = kind == "again" or kind == "skip" and (*key, False) in found
                found[*key, again] = None if kind == "skip" else pair["chosen"]
        # By key: the text that was chosen, None for a skip
        self.answers = {q.key: found[q.key] for q in questions if q.key in found}

    def _is_open(self, question) -> bool:
        """Whether it has no answer; what was skipped is not repeated."""
        skipped = self.answers.get((*question.key[:2], False), "") is None
        return question.key not in self.answers and not (question.again and skipped)

    @property
    def question(self) -> Question | None:
        """What to ask now; None when everything is answered."""
        return next(filter(self._is_open, self.questions), None)

    @property
    def done(self) -> int:
        """How many questions are behind."""
        return (*self.questions, None).index(self.question)

    def answer(self, key: str):
        """Take an answer: 1 (left), 2 (right), s (skip) or u (undo the last one).

        Raises ValueError for another key, or if there is nothing to answer or to undo.
        """
        if key not in KEYS:
            raise ValueError(f"an answer is 1, 2, s (skip) or u (undo), got {key!r}")
        if key == "u":
            return self._undo()
        if (question := self.question) is None:
            raise ValueError(f"all {len(self.questions)} questions are answered")
        chosen = {"1": question.left, "2": question.right}.get(key)
        append_pair(*self._line(question, chosen))
        self.answers[question.key] = chosen

    def _undo(self):
        if not self.answers:
            raise ValueError("there is no answer to undo; answer 1, 2 or s first")
        key, chosen = next(reversed(self.answers.items()))
        question = next(q for q in self.questions if q.key == key)
        remove_pair(*self._line(question, chosen))
        del self.answers[key]

    def _line(self, question, chosen) -> tuple[Path, dict[str, str]]:
        """Where an answer is written, and as what pair; None is a skip."""
        kind = "skip" if chosen is None else "again" if question.again else "pairs"
        texts = [question.left, question.right]
        if chosen == question.right:
            texts.reverse()
        pair = {"prompt": question.prompt, "chosen": texts[0], "rejected": texts[1]}
        return self.files[kind], pair

    def report(self) -> dict[str, float]:
        """How the labeller does, as figures.

        `answered` (repeats included) and `skipped` are counts; `left` is the share of
        answers for the left side, 0.5 without a bias; `repeated` counts the questions
        that were answered twice, and `consistent` is the share of them in which the
        same text was chosen both times. Shares of nothing are NaN.
        """
        said = self.answers
        given = [q for q in self.questions if said.get(q.key) is not None]
        left = [said[q.key] == q.left for q in given]
        again = [q.key for q in given if q.again]
        same = [said[key] == said.get((*key[:2], False)) for key in again]
        return {
            "answered": len(given),
            "skipped": len(said) - len(given),
            "left": sum(left) / len(left) if left else math.nan,
            "repeated": len(same),
            "consistent": sum(same) / len(same) if same else math.nan,
        }


def describe(report: dict[str, float]) -> str:
    """A labeller's report as a sentence or two."""
    said = "{answered} answers, {skipped} skipped"
    if report["answered"]:
        said += "; the left one in {left:.0%}"
    if report["repeated"]:
        said += (
            "; of {repeated} asked twice, the same one was chosen in {consistent:.0%}"
        )
    return said.format(**report)
