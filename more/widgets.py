"""Sliders and buttons for a notebook; what they do is in `more.talk` and `.blind`.

Written for ipywidgets 7.7, which Colab has, and 8.
"""

import html

import ipywidgets
from IPython.display import display

from more.blind import BlindTest
from more.common import somebody_is_there
from more.talk import TEMPERATURES, Talk, card, visible

WIDE = {"width": "95%"}


def show(box: ipywidgets.Widget):
    """Display a box, if somebody is there: a saved notebook must hold none."""
    if somebody_is_there():
        display(box)
    else:
        print("(a box to write and click in stands here when you run this yourself)")


def writing_box(talk: Talk, prompt: str = "the film is") -> ipywidgets.Widget:
    """A prompt, temperature and seed, a button, and both models' replies below."""
    low, high = TEMPERATURES
    fields = {
        "prompt": ipywidgets.Text(prompt, description="prompt", layout=WIDE),
        "temperature": ipywidgets.FloatSlider(
            1.0, min=low, max=high, step=0.1, description="temperature"
        ),
        "seed": ipywidgets.IntSlider(0, min=0, max=100, description="seed"),
    }
    for one in fields.values():
        one.style.description_width = "6em"  # else "temperature" is cut off
    button, answer = ipywidgets.Button(description="write"), ipywidgets.HTML()

    def write(_=None):
        try:
            replies = talk.write(**{name: x.value for name, x in fields.items()})
            answer.value = "".join(map(card, replies.values()))
        except ValueError as error:
            answer.value = html.escape(str(error))

    button.on_click(write)
    write()
    return ipywidgets.VBox([*fields.values(), button, answer])


def blind_box(test: BlindTest) -> ipywidgets.Widget:
    """Two texts side by side without names, and a button under each."""
    said = ipywidgets.HTML(layout=WIDE)
    buttons = {
        "left": ipywidgets.Button(description="left is better"),
        "right": ipywidgets.Button(description="right is better"),
        "undo": ipywidgets.Button(description="undo"),
    }

    def look():
        for side in ("left", "right"):
            buttons[side].disabled = test.done
        if test.done:
            said.value = f"All {len(test)} pairs are done: run the next cell."
            return
        prompt, *texts = (html.escape(visible(text)) for text in test.shown())
        cells = "".join(
            f'<td style="width:45%;text-align:left"><b>{side}</b>: {prompt}{text}</td>'
            for side, text in zip(("left", "right"), texts, strict=True)
        )
        place = f"pair {test.place + 1} of {len(test)}"
        said.value = f"{place}<table><tr>{cells}</tr></table>"

    def pressed(name):
        def press(_):
            test.undo() if name == "undo" else test.choose(name)
            look()

        return press

    for name, button in buttons.items():
        button.on_click(pressed(name))
    look()
    return ipywidgets.VBox([said, ipywidgets.HBox(list(buttons.values()))])
