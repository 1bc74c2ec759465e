"""Boxes to write and click in; what they do is in `talk.py` and `labelling.py`.

Written for ipywidgets 7.7, which Colab has, and 8.
"""

import html
from collections.abc import Callable

import ipywidgets
from IPython import get_ipython
from IPython.display import HTML, display

from more.labelling import KEYS, Labeller, describe
from more.talk import TEMPERATURES, Talk, card


def somebody() -> bool:
    """Whether a person may click: a saved notebook must hold no widget.

    Programs that execute a notebook (nbclient, papermill) say with each cell that
    nobody can be asked anything.
    """
    return getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False)


def show(box: ipywidgets.Widget):
    """Display a box, if somebody is there."""
    if somebody():
        display(box)
    else:
        print("(a box to write and click in stands here when you run this yourself)")


def sliders(look: Callable, **ranges):
    """The picture that `look` returns; with its arguments as sliders for a person.

    It is drawn anew when one is let go; `rollout` is followed.
    """
    if not somebody():
        return display(look())
    box = ipywidgets.interactive(look, {"auto_display": True}, **ranges)
    for widget in box.children[:-1]:
        if widget.description != "rollout":
            widget.continuous_update, widget.readout_format = False, ".2g"
    display(box)


def writing_box(talk: Talk, prompt: str = "the film is") -> ipywidgets.Widget:
    """A prompt, temperature and seed, a button, and both models' replies below."""

    def write(prompt, temperature, seed):
        try:
            said = "".join(map(card, talk.write(prompt, temperature, seed).values()))
        except ValueError as error:
            said = html.escape(str(error))
        display(HTML(said))
        return HTML(said)

    low, high = TEMPERATURES
    slider = ipywidgets.FloatSlider(1.0, min=low, max=high, step=0.1)
    how = {"prompt": prompt, "temperature": slider, "seed": (0, 100)}
    by_button = {"manual": True, "manual_name": "write"}
    return ipywidgets.interactive(write, by_button, **how)


def labelling_box(labeller: Labeller) -> ipywidgets.Widget:
    """The labeller's questions: two texts, a button for each answer, keys, progress.

    For the keys, click into the field below the buttons; it takes 1, 2, s and u.
    """
    total, wide = len(labeller.questions), {"width": "98%"}
    texts, status = ipywidgets.HTML(layout=wide), ipywidgets.HTML()
    bar = ipywidgets.IntProgress(max=total, layout=wide)
    names = ("1: the left", "2: the right", "s: skip", "u: undo")
    buttons = [ipywidgets.Button(description=name) for name in names]
    field = ipywidgets.Text(placeholder="click here for the keys 1, 2, s, u")

    def take(keys=""):
        said = ""
        for key in keys.strip().lower():
            try:
                labeller.answer(key)
            except (ValueError, OSError) as error:
                said = str(error)
        texts.value, bar.value = _asked(labeller.question), labeller.done
        so_far = f"{labeller.done} of {total}: {describe(labeller.report())}"
        status.value = html.escape(said or so_far)
        for button in buttons[:3]:
            button.disabled = labeller.question is None
        field.value = ""

    for button, key in zip(buttons, KEYS, strict=True):
        button.on_click(lambda _, key=key: take(key))
    field.observe(lambda change: change["new"] and take(change["new"]), names="value")
    take()
    return ipywidgets.VBox([texts, ipywidgets.HBox(buttons), field, bar, status])


def _asked(question) -> str:
    """A question as HTML, its two texts side by side."""
    if question is None:
        return "<b>All questions are answered.</b>"
    prompt, *sides = map(html.escape, (question.prompt, question.left, question.right))
    style = "width:48%;border:1px solid #8a8a8a;padding:8px;text-align:left"
    cells = "".join(
        f'<td style="{style}"><b>{n}</b><br>{prompt}<b>{side}</b></td>'
        for n, side in enumerate(sides, start=1)
    )
    return (
        f"Which goes on better? <i>{prompt} …</i>"
        f'<table style="width:100%"><tr>{cells}</tr></table>'
    )
