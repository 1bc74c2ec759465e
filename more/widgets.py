"""A box to write to two models in a notebook; what it does is in `more.talk`.

Written for ipywidgets 7.7, which Colab has, and 8.
"""

import html

import ipywidgets
from IPython import get_ipython
from IPython.display import HTML, display

from more.talk import TEMPERATURES, Talk, card


def show(box: ipywidgets.Widget):
    """Display a box, if somebody is there: a saved notebook must hold none.

    Programs that execute a notebook (nbclient, papermill) say with each cell that
    nobody can be asked anything.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if getattr(kernel, "_allow_stdin", False):
        display(box)
    else:
        print("(a box to write and click in stands here when you run this yourself)")


def writing_box(talk: Talk, prompt: str = "the film is") -> ipywidgets.Widget:
    """A prompt, temperature and seed, a button, and both models' replies below."""

    def write(prompt, temperature, seed):
        try:
            replies = talk.write(prompt, temperature, seed)
            said = HTML("".join(map(card, replies.values())))
        except ValueError as error:
            said = HTML(html.escape(str(error)))
        display(said)
        return said

    low, high = TEMPERATURES
    slider = ipywidgets.FloatSlider(1.0, min=low, max=high, step=0.1)
    how = {"prompt": prompt, "temperature": slider, "seed": (0, 100)}
    by_button = {"manual": True, "manual_name": "write"}
    return ipywidgets.interactive(write, by_button, **how)
