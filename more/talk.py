"""Write to two models at once, and see what PPO has moved.

The same prompt, temperature and seed for the model before PPO (the reference) and the
one after it (the policy); the reward model's score of each text; and, token by token,
how much likelier PPO has made it.
"""

import html
from dataclasses import dataclass
from functools import partial

import torch

from utils.data import clean, encode, pad
from utils.rollout import response_logprobs, response_tokens, sample_responses, squash

BEFORE, AFTER = "before PPO", "after PPO"
LIKELIER, LESS_LIKELY = "59, 111, 182", "200, 85, 61"  # the plots' blue and red
FULL_COLOUR = 2.0  # a log-ratio that is painted as strongly as any [nats]
EOS = "EOS"  # how the token that ends a text is shown
TEMPERATURES = (0.1, 2.0)


@dataclass(frozen=True)
class Reply:
    """What one model wrote after a prompt, and what the others say of it.

    `pieces` has the text of each response token, and `log_ratios` its log pi - log
    pi_ref [nats], whichever of the two wrote it; `raw` is the reward model's logit for
    the whole text, and `reward` the same between -1 and 1; `ended`: with EOS.
    """

    name: str
    prompt: str
    tokens: list[int]
    pieces: list[str]
    log_ratios: list[float]
    raw: float
    reward: float
    ended: bool

    @property
    def response(self) -> str:
        """The response as text, without EOS."""
        return "".join(self.pieces[:-1] if self.ended else self.pieces)

    @property
    def text(self) -> str:
        """Prompt and response."""
        return self.prompt + self.response


class Talk:
    """A language model before and after PPO, and the reward model, to write to."""

    def __init__(self, reference, policy, reward_model, tokenizer, settings):
        self.models = {BEFORE: reference, AFTER: policy}
        self.reward_model, self.tokenizer = reward_model, tokenizer
        self.settings, self.eos_id = settings, tokenizer.eos_token_id
        limit = getattr(reference.config, "max_position_embeddings", 1024)
        # The longest prompt after which a whole response can still be read [tokens]
        self.longest = limit - settings.max_new_tokens

    def encode(self, prompt: str) -> list[int]:
        """The token ids of a prompt, without the spaces around it.

        A space at its end would be a token of its own, which no review has: words begin
        with theirs. Raises ValueError if nothing is left, if the prompt holds EOS or
        half a character, or if it is too long for the model.
        """
        prompt, eos = clean(prompt), self.tokenizer.eos_token
        prompt.encode()  # an error for half a character
        if not prompt:
            raise ValueError("the prompt is empty; write a few words, as 'the film is'")
        if eos in prompt:
            raise ValueError(f"the prompt holds {eos!r}, which ends texts; take it out")
        (ids,) = encode([prompt], self.tokenizer)
        if len(ids) > self.longest:
            most = f"{self.longest}, which leave room for a response"
            raise ValueError(f"the prompt has {len(ids)} tokens; shorten it to {most}")
        return ids

    @torch.no_grad()
    def reply(self, name: str, prompt: list[int], response: list[int]) -> Reply:
        """What all models say of a response to a prompt, both as token ids.

        Log-probabilities are those of the temperature that PPO trained with.
        """
        ids = torch.tensor([prompt + response], device=self.models[BEFORE].device)
        text = (ids, torch.ones_like(ids), torch.ones_like(ids[:, len(prompt) :]))
        before, after = (
            response_logprobs(lm, *text, self.settings.temperature)[0]
            for lm in self.models.values()
        )
        raw = self.reward_model(ids, torch.ones_like(ids))
        return Reply(
            name,
            self.tokenizer.decode(prompt, skip_special_tokens=True),
            response,
            token_texts(self.tokenizer, prompt, response),
            (after - before).tolist(),
            raw.item(),
            squash(raw).item(),
            response[-1] == self.eos_id,
        )

    def write(
        self, prompt: str, temperature: float = 1.0, seed: int = 0
    ) -> dict[str, Reply]:
        """A response of each model to the prompt, from the same random numbers.

        As long as the two models agree, the same numbers draw the same tokens. Raises
        ValueError as `encode` does, and for a temperature out of range.
        """
        low, high = TEMPERATURES
        if not low <= temperature <= high:
            raise ValueError(
                f"take a temperature from {low} to {high}, not {temperature}"
            )
        ids, replies = self.encode(prompt), {}
        for name, lm in self.models.items():
            text = (x.to(lm.device) for x in pad([ids], self.eos_id, side="left"))
            generator = torch.Generator(lm.device).manual_seed(seed)
            how = self.eos_id, self.settings.max_new_tokens, temperature, generator
            drawn, _, mask = sample_responses(lm, *text, *how)
            (response,) = response_tokens(drawn, mask)
            replies[name] = self.reply(name, ids, response)
        return replies


def token_texts(tokenizer, prompt: list[int], response: list[int]) -> list[str]:
    """What each response token adds to the text; EOS is called so.

    A letter such as é may be several tokens: the last of them adds it, the others
    nothing.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    texts, done = [], decode(prompt)
    for n, token in enumerate(response, start=1):
        text = decode(prompt + response[:n])
        if token == tokenizer.eos_token_id:
            texts.append(EOS)
        elif text.endswith("\ufffd") and n < len(response):  # bytes, no letter yet
            texts.append("")
        else:
            texts.append(text[len(done) :])
            done = text
    return texts


def visible(text: str) -> str:
    """The text, with the number of each character that is not seen, as ⟨U+202E⟩."""
    return "".join(x if x.isprintable() else f"⟨U+{ord(x):04X}⟩" for x in text)


def _shown(pieces, log_ratios):
    shown = (f" {EOS}" if piece == EOS else visible(piece) for piece in pieces)
    return zip(shown, log_ratios, strict=True)


def shaded_html(pieces: list[str], log_ratios: list[float]) -> str:
    """Tokens on coloured grounds: blue what PPO made likelier, red what less likely.

    The stronger the colour, the larger the log-ratio; from FULL_COLOUR on all alike.
    The number is shown when a mouse rests on the token.
    """
    spans = []
    for piece, ratio in _shown(pieces, log_ratios):
        colour = LIKELIER if ratio > 0 else LESS_LIKELY
        strength = 0.6 * min(abs(ratio) / FULL_COLOUR, 1)
        style = f'style="background:rgba({colour}, {strength:.2f})"'
        title = f'title="{ratio:+.2f} nats"'
        spans.append(f"<span {style} {title}>{html.escape(piece)}</span>")
    return f'<span style="white-space:pre-wrap">{"".join(spans)}</span>'


def shaded_text(pieces: list[str], log_ratios: list[float]) -> str:
    """The same without colours: behind a token its log-ratio, unless it is near 0."""
    return "".join(
        piece + (f"[{ratio:+.1f}]" if abs(ratio) >= 0.05 else "")
        for piece, ratio in _shown(pieces, log_ratios)
    )


def card(reply: Reply) -> str:
    """A reply as HTML: who wrote it, its reward, and the shaded text."""
    end = "" if reply.ended else " …"
    return (
        f"<p><b>{html.escape(reply.name)}</b>, reward {reply.reward:+.2f}<br>"
        f"{html.escape(visible(reply.prompt))}"
        f"{shaded_html(reply.pieces, reply.log_ratios)}{end}</p>"
    )
