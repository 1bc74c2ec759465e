"""A page to write to both models: `python -m tools.page`, with `--share` on Colab.

The prompt goes to the model before and after PPO, side by side, token by token; under
each text stands its reward, and the tokens are coloured by what PPO has moved. Visitors
wait in a queue; what the limits are is said on the page.
"""

import argparse
import html
import os
from itertools import zip_longest

from more.talk import AFTER, BEFORE, EOS, TEMPERATURES, Talk, card, token_texts, visible
from utils.data import load_tokenizer
from utils.models import RewardModel, freeze, load_causal_lm
from utils.runs import find_artefacts
from utils.settings import PRESETS, load_settings
from utils.training import get_device

LETTERS = 2_000  # of a prompt; what is longer is refused before it is read
AT_ONCE = 2  # so many prompts are written to at the same time
WAITING = 400  # so many may wait; who comes then is asked to come again
FAILED = "something went wrong here; try again"


def load(settings) -> Talk:
    """The models of notebooks 1 to 3, to write to."""
    device = get_device(settings)
    sft, judge, policy = find_artefacts(settings, "sft", "reward_model", "policy")
    lms = [freeze(load_causal_lm(folder, device)) for folder in (sft, policy)]
    reward_model = freeze(RewardModel.from_pretrained(judge).to(device))
    return Talk(*lms, reward_model, load_tokenizer(sft), settings)


def answers(talk: Talk, prompt, temperature, seed):
    """Both texts as they grow, each as HTML, and at the end with scores and colours.

    Whatever is wrong with the prompt is said in a sentence, in both places.
    """
    try:
        prompt = str(prompt or "")
        if len(prompt) > LETTERS:
            raise ValueError(
                f"the prompt has {len(prompt):,} characters, and {LETTERS:,} are read "
                "here at most; shorten it"
            )
        ids = talk.encode(prompt)
        numbers = float(temperature), int(seed)
        tokens = {name: [] for name in (BEFORE, AFTER)}
        for drawn in zip_longest(
            *(talk.stream(name, ids, *numbers) for name in tokens)
        ):
            for name, token in zip(tokens, drawn, strict=True):
                tokens[name] += [] if token is None else [token]
            yield tuple(_so_far(talk, name, ids, tokens[name]) for name in tokens)
        yield tuple(card(talk.reply(name, ids, tokens[name])) for name in tokens)
    except ValueError as error:
        yield (f"<p>{html.escape(visible(str(error)))}</p>",) * 2
    except (TypeError, OverflowError):
        yield ("<p>temperature and seed must be numbers</p>",) * 2


def _so_far(talk, name, prompt, response):
    pieces = token_texts(talk.tokenizer, prompt, response)
    whole = talk.tokenizer.decode(prompt, skip_special_tokens=True)
    text = visible(whole + "".join(piece for piece in pieces if piece != EOS))
    return f"<p><b>{html.escape(name)}</b> …<br>{html.escape(text)}</p>"


def build(talk: Talk):
    """The page, ready to be launched."""
    import gradio

    def write(prompt, temperature, seed):
        try:
            yield from answers(talk, prompt, temperature, seed)
        except Exception as error:  # nobody is shown where it happened
            print(f"a prompt failed: {type(error).__name__}")
            yield (f"<p>{FAILED}</p>",) * 2

    low, high = TEMPERATURES
    page = gradio.Interface(
        write,
        [
            gradio.Textbox("the film is", label="prompt", elem_id="prompt"),
            gradio.Slider(low, high, 1.0, step=0.1, label="temperature"),
            gradio.Number(0, label="seed", precision=0, elem_id="seed"),
        ],
        [gradio.HTML(elem_id=name.split()[0]) for name in (BEFORE, AFTER)],
        title="Before and after PPO",
        description="The same prompt, temperature and seed for both models. Blue is "
        "what PPO has made likelier, red what less likely; the reward goes from −1 "
        f"(blame) to 1 (praise).\n\nPrompts of up to {LETTERS:,} characters and "
        f"{talk.longest} tokens; {AT_ONCE} are answered at a time, and {WAITING} may "
        "wait. The texts are made up.",
        submit_btn=gradio.Button("write", elem_id="write"),
        clear_btn=None,
        flagging_mode="never",
        api_name="write",
        show_progress="hidden",
        concurrency_limit=AT_ONCE,
        analytics_enabled=False,
    )
    return page.queue(max_size=WAITING)


def main(argv=None):
    """Load the models of a preset and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tools.page")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--port", type=int, default=7860)
    public = "a public address, through gradio's servers"
    parser.add_argument("--share", action="store_true", help=public)
    options = parser.parse_args(argv)
    # Nothing is sent anywhere unless asked; read when gradio is imported
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        parser.error("gradio is missing; pip install -r tools/page-requirements.txt")
    try:
        page = build(load(load_settings(options.preset)))
        where = {"server_name": "127.0.0.1", "server_port": options.port}
        page.launch(**where, share=options.share, show_error=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
