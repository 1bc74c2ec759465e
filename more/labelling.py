"""A person at work: which of two texts is better? The logic, and a thin front for it.

The logic knows no widget: `Labeller` asks, takes an answer, and has it on disk before
it asks again. `labelling_box` shows that with buttons and keys in a notebook.
"""

import html
import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from more.preferences import append_line, append_pair, read_pairs

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
    a labeller's consistency and bias for a side can be measured. Raises ValueError if
    two texts of a pair are the same, or if a pair comes twice.
    """
    rng, questions, open_to_repeat, known = random.Random(seed), [], [], set()
    for prompt, *texts in pairs:
        rng.shuffle(texts)
        question = Question(prompt, *texts)
        if question.left == question.right or question.key in known:
            raise ValueError(
                f"the pair of {question.left!r} and {question.right!r} for {prompt!r} "
                "is one text, or comes twice; leave it out"
            )
        known.add(question.key)
        questions.append(question)
        open_to_repeat.append(question)
        if len(questions) % every == every - 1:
            some = open_to_repeat[:-1] or open_to_repeat  # not the one just asked
            first = some[rng.randrange(len(some))]
            open_to_repeat.remove(first)
            swapped = Question(first.prompt, first.right, first.left, again=True)
            questions.append(swapped)
    return questions


def answer_of(left_utility: float, right_utility: float, rng: random.Random) -> str:
    """What a labeller of Bradley–Terry type says: 1 with probability sigmoid(u1 - u2).

    Bradley & Terry 1952. The utilities are in units of their own noise.
    """
    chance = 0.5 * (1 + math.tanh((left_utility - right_utility) / 2))
    return "1" if rng.random() < chance else "2"


class Labeller:
    """Asks its questions in order, and has each answer on disk before the next.

    Answers go to `path` as pairs (JSON Lines of prompt, chosen, rejected), those to
    repeated questions to `<name>.again.jsonl`, and what was skipped to
    `<name>.skipped.jsonl`. A new `Labeller` with the same questions and path goes on
    where an earlier one stopped. `faults` says which lines of the files it could not
    read.
    """

    def __init__(self, questions: list[Question], path):
        path, ends = Path(path), {"pairs": "", "again": ".again", "skip": ".skipped"}
        self.files = {
            kind: path.with_name(f"{path.stem}{end}.jsonl")
            for kind, end in ends.items()
        }
        self.questions, self.faults, self._next = questions, [], 0
        found = self._read()
        # By key: the text that was chosen, None for a skip
        self.answers = {q.key: found[q.key] for q in questions if q.key in found}

    def _read(self) -> dict:
        found = {}
        for kind in ("pairs", "again"):
            if self.files[kind].exists():
                pairs, faults = read_pairs(self.files[kind])
                self.faults += faults
                for pair in pairs:
                    texts = frozenset((pair["chosen"], pair["rejected"]))
                    found[pair["prompt"], texts, kind == "again"] = pair["chosen"]
        if self.files["skip"].exists():
            for line in self.files["skip"].read_text("utf8").split("\n")[:-1]:
                skipped = Question(**json.loads(line))
                found.setdefault(skipped.key, None)
        return found

    @property
    def question(self) -> Question | None:
        """What to ask now; None when everything is answered."""
        while self._next < len(self.questions):
            question = self.questions[self._next]
            # What was skipped is not repeated
            skipped = self.answers.get((*question.key[:2], False), "") is None
            if question.key not in self.answers and not (question.again and skipped):
                return question
            self._next += 1
        return None

    @property
    def done(self) -> int:
        """How many questions are behind."""
        return len(self.questions) if self.question is None else self._next

    def answer(self, key: str):
        """Take an answer: 1 (left), 2 (right), s (skip) or u (undo the last one).

        Raises ValueError for another key, or if there is nothing to answer or to undo.
        """
        if key not in KEYS:
            raise ValueError(f"an answer is 1, 2, s (skip) or u (undo), got {key!r}")
        if key == "u":
            self._undo()
        elif (question := self.question) is None:
            raise ValueError(f"all {len(self.questions)} questions are answered")
        elif key == "s":
            append_line(self.files["skip"], vars(question))
            self.answers[question.key] = None
        else:
            texts = (question.left, question.right)
            chosen, rejected = texts if key == "1" else texts[::-1]
            pair = {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}
            append_pair(self.files["again" if question.again else "pairs"], pair)
            self.answers[question.key] = chosen

    def _undo(self):
        if not self.answers:
            raise ValueError("there is no answer to undo; answer 1, 2 or s first")
        key, chosen = self.answers.popitem()
        kind = "skip" if chosen is None else "again" if key[2] else "pairs"
        lines = self.files[kind].read_bytes().split(b"\n")[:-1]
        kept = b"".join(line + b"\n" for line in lines[:-1])
        with self.files[kind].open("r+b") as file:
            file.truncate(len(kept))
        self._next = [question.key for question in self.questions].index(key)

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
    said = f"{report['answered']} answers, {report['skipped']} skipped"
    if report["answered"]:
        said += f"; the left one in {report['left']:.0%}"
    if report["repeated"]:
        said += (
            f"; of {report['repeated']} asked twice, the same one was chosen in "
            f"{report['consistent']:.0%}"
        )
    return said


def labelling_box(labeller: Labeller):
    """A widget that puts the labeller's questions: two texts, buttons, keys, progress.

    With ipywidgets 7.7 or newer, which `jupyter` and Colab bring. For the keys, click
    into the field below the buttons; it takes 1, 2, s and u.
    """
    import ipywidgets as widgets

    wide, half = widgets.Layout(width="98%"), widgets.Layout(width="48%")
    prompt, status = widgets.HTML(), widgets.HTML()
    sides = [widgets.HTML(layout=half) for _ in range(2)]
    bar = widgets.IntProgress(max=len(labeller.questions), layout=wide)
    names = ("1: the left", "2: the right", "s: skip", "u: undo")
    buttons = [widgets.Button(description=name) for name in names]
    field = widgets.Text(placeholder="click here for the keys 1, 2, s, u")

    def show(said=""):
        question = labeller.question
        asked = question or Question("", "", "")
        for number, side in enumerate(sides, 1):
            text = (asked.left, asked.right)[number - 1]
            side.value = (
                f"<div style='border:1px solid #8a8a8a;padding:8px;margin:4px'>"
                f"<b>{number}</b><br>{html.escape(asked.prompt)}"
                f"<b>{html.escape(text)}</b></div>"
            )
        begin = f"Which goes on better? <i>{html.escape(asked.prompt)} …</i>"
        prompt.value = begin if question else "<b>All questions are answered.</b>"
        bar.value = labeller.done
        counted = f"{labeller.done} of {len(labeller.questions)}"
        status.value = html.escape(said or f"{counted}: {describe(labeller.report())}")
        for button in buttons[:3]:
            button.disabled = question is None

    def take(key):
        try:
            labeller.answer(key)
        except ValueError as error:
            show(str(error))
        else:
            show()

    def typed(change):
        field.value = ""
        for key in change["new"].strip().lower():
            take(key)

    for button, key in zip(buttons, KEYS, strict=True):
        button.on_click(lambda _, key=key: take(key))
    field.observe(lambda change: change["new"] and typed(change), names="value")
    show()
    return widgets.VBox(
        [prompt, widgets.HBox(sides), widgets.HBox(buttons), field, bar, status]
    )
