"""The notebooks as slides, in large type: pass this to nbconvert with `--config`.

Each cell's slide type is in its metadata. Beyond that, a markdown cell leaves on the
slide what is read at a glance, and its long paragraphs become the speaker's notes.
"""

import re
from copy import deepcopy

from nbconvert.preprocessors import Preprocessor
from nbformat.v4 import new_markdown_cell

PARAGRAPH, SLIDE = 25, 110  # the most words of a paragraph, and of all, on a slide
LINES, PICTURE = 20, 15  # of code and output on one slide; a picture's height in lines

STOP = re.compile(r"\*Before you run it:[^*]*\*")
LEAD = re.compile(r"\*\*[^*]+\*\*(?:[^.?]{0,150}[.?](?= |$))?")
SPOKEN = re.compile(r"\[!\[|\*\*(What it needs|How long|What to change|Where )")
CSS = """<style>
.reveal { --jp-content-font-size1: 26px; --jp-code-font-size: 19px }
.reveal .celltag_long, .reveal .celltag_wide { --jp-code-font-size: 17px }
.reveal .celltag_longest { --jp-code-font-size: 14px }
.reveal blockquote { width: 90%; font-size: 34px }
.reveal .jp-RenderedHTMLCommon table { font-size: 18px }
.reveal section img { width: auto; height: auto; max-width: 100%; max-height: 470px }
.reveal section .celltag_long img { max-height: 310px }
.reveal section .celltag_alone img { max-height: 550px }
.reveal .jp-Cell { position: relative }
.reveal .jp-Cell::before { content: attr(id); color: #aaa; font: 13px monospace;
    position: absolute; right: 0; top: -6px }
</style>"""


def words(text):
    """How many words a reader sees, without displayed formulas."""
    text = re.sub(r"\$\$.*?\$\$|\]\([^)]*\)", "", text, flags=re.S)
    return len(re.findall(r"\S*\w\S*", text))


def at_a_glance(block):
    """What stays on the slide of a heading, paragraph, list, table or formula."""
    if SPOKEN.match(block):
        return ""
    most = SLIDE if re.match(r"[*|\d-][ .]|    ", block) else PARAGRAPH
    if words(block) <= most or block[0] in "#$":
        return STOP.sub(r"\n\n> \g<0>", block)
    parts = [found[0] for found in [LEAD.match(block)] if found]
    return "\n\n".join([*parts, *(f"> {stop}" for stop in STOP.findall(block))])


def markdown(cell, before_code):
    """The cells that take a markdown cell's place: slides, and notes for each."""
    made = []

    def add(texts, kind):
        made.append(new_markdown_cell("\n\n".join(texts)))
        made[-1].id = cell.id + f"-{len(made)}" * (len(made) > 1)
        made[-1].metadata.slideshow = {"slide_type": kind}

    pages = [([], [])]  # what is shown, and what is spoken
    blocks = re.split(r"\n\n(?! )", cell.source)
    items = [re.split(r"\n(?=\* )", x) if words(x) > SLIDE else [x] for x in blocks]
    for block in sum(items, []):  # a long list may go over two slides
        shown, spoken = pages[-1]
        kept = at_a_glance(block)
        begins = kept[:1] == "#" and not all(x[0] == "#" for x in shown)
        begins |= sum(map(words, [*shown, kept])) > SLIDE
        if kept and (begins or (spoken and not shown)):
            shown, spoken = [], []
            pages.append((shown, spoken))
        if kept:
            shown.append(kept)
        if kept != block:
            spoken.append(block)
    for shown, spoken in pages:
        plain = not any(re.match(r"[#$|>\n]|[*\d-][* .]", x) for x in shown)
        if plain and not (before_code and shown is pages[-1][0]):
            shown, spoken = [], shown + spoken  # a remark on what stands above
        if shown:
            add(shown, "slide" if re.match("##? ", shown[0]) else "subslide")
        if spoken:
            add(spoken, "notes")
    return made


def length(cell):
    """How many lines the outputs of a code cell take."""
    lines = 0
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text", "") + data.get("text/markdown", "")
        lines += text.count("\n") * (1 + ("| --- |" in text))
        lines += PICTURE * ("image/png" in data)
    return lines


def code(cell, above):
    """A code cell, and its output on a slide of its own where both do not fit on one.

    A short one stands below what the slide above says, if that asks for no prediction.
    """
    source, output = cell.source.count("\n") + 1, length(cell)
    parts = [(cell, source + output)]
    if output > 2 and source + output > LINES or cell.id == "settings":
        result = deepcopy(cell)
        result.id += "-output"
        result.metadata.transient = {"remove_source": True}
        parts, cell.outputs = [(cell, source), (result, output)], []
    for part, lines in parts:
        part.metadata.slideshow = {"slide_type": "subslide"}
        if lines > LINES + 1:
            part.metadata.tags = ["long" if lines <= 31 else "longest"]
        elif part.outputs and PICTURE <= lines <= PICTURE + 2:
            part.metadata.tags = ["alone"]
        elif any(
            len(x) > 95 for y in part.outputs for x in y.get("text", "").split("\n")
        ):
            part.metadata.tags = ["wide"]
    fits = parts[0][1] + above.count("\n") <= LINES - 4 and words(above) <= 45
    if above and fits and not STOP.search(above):
        cell.metadata.slideshow = {"slide_type": "-"}
    return [part for part, _ in parts[cell.id == "settings" :]]  # its picture only


class Slides(Preprocessor):
    """Large type, long paragraphs to the notes, code and long outputs apart."""

    def preprocess(self, nb, resources):
        """The notebook with other cells."""
        made, above = [], ""
        kinds = [x.metadata.get("slideshow", {}).get("slide_type") for x in nb.cells]
        cells = [x for x, kind in zip(nb.cells, kinds, strict=True) if kind != "skip"]
        for cell, after in zip(cells, [*cells[1:], None], strict=True):
            if cell.cell_type == "code":
                made, above = made + code(cell, above), ""
                continue
            for each in markdown(cell, after and after.cell_type == "code"):
                made.append(each)
                if each.metadata.slideshow["slide_type"] != "notes":
                    above = each.source
        made[0].source += f"\n\n{CSS}"
        nb.cells = made
        return nb, resources


c = get_config()  # noqa: F821  (nbconvert defines it)
c.SlidesExporter.preprocessors = [Slides]
c.SlidesExporter.reveal_scroll = True
c.SlidesExporter.reveal_width, c.SlidesExporter.reveal_height = "1280", "720"
c.SlidesExporter.reveal_transition, c.SlidesExporter.reveal_number = "none", "c/t"
c.SlidesExporter.exclude_input_prompt = c.SlidesExporter.exclude_output_prompt = True
