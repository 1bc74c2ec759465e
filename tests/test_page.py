"""The page: odd prompts, and many visitors at once."""

import dataclasses
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from more.talk import Talk
from tests.more.test_talk import talk  # noqa: F401
from tools import page

TRACE = re.compile(r"Traceback|File \"|Error:|/(?:home|root|tmp|usr)/|\.py\b")
REFUSED = {  # what is said of these prompts, temperatures and seeds
    "the prompt is empty": [(x, 1, 0) for x in ("", " ", "\n\t", None, [], {})],
    "which ends a text; take it out": [("so <|endoftext|> dull", 1, 0)],
    "characters, and 2,000 are read": [("a" * 10_000, 1, 0), ("film " * 900, 1, 0)],
    "half a character": [("\ud83d", 1, 0)],
    "tokens, and the model reads 126": [("x " * 999, 1, 0), ("é" * 700, 1, 0)],
    "temperature must be from 0.1 to 2, got 9": [("the film", 9, 0)],
    "seed must be from 0 to": [("the film", 1, 2**40)],
    "&#x27;&lt;b&gt;&#x27;": [("the film", 1, "<b>")],
    "seed must be numbers": [("the film", None, 0), ("the film", 1, float("inf"))],
}
ODD = "\x00 \ufeff \u202e \ufffd </s> <pad> <b> &lt;b&gt; {0} {prompt} %s%n nan $(ls)"
ODD += " 好是 кино فيلم סרט ภาพ 映画 한국 हिन्दी 😀👩\u200d👧 ﷽ Z̵͑a̷l̴g̸o ../../etc"
ODD = [*ODD.split(), "'; DROP TABLE films; --", "<img src=x onerror=y>", 5, True, [1]]


def test_what_is_odd_gets_a_text_or_a_sentence(talk):  # noqa: F811
    """No exception, no trace, no tag but our own; and all of it ends."""
    models = (*talk.models.values(), talk.reward_model, talk.tokenizer)
    short = Talk(*models, dataclasses.replace(talk.settings, max_new_tokens=2))
    letter, rng = lambda: chr(rng.randrange(0xD800)), random.Random(0)
    letters = ["".join(letter() for _ in range(30)) for _ in range(60)]
    cases = [(x, said) for said, given in REFUSED.items() for x in given]
    for given, said in cases + [((x, 1, 0), "</span>") for x in ODD + letters]:
        *_, last = page.answers(short, *given)
        for place in last:
            assert said in place
            assert not TRACE.search(place.replace(str(given[0]), "")), place[:300]
            tags = set(re.findall(r"<(/?\w+)", place))
            assert tags <= {"p", "/p", "b", "/b", "br", "span", "/span"}, place[:300]
            place.encode("utf8")  # as it is sent


def test_the_texts_grow_until_they_are_whole(talk, monkeypatch, capsys):  # noqa: F811
    *growing, last = page.answers(talk, "the film is", 1.0, 4)
    for place, reply in enumerate(talk.write("the film is", 1.0, 4).values()):
        texts = [re.sub(r"<[^>]*>", "", step[place]) for step in growing]
        assert all(map(str.startswith, texts[1:], texts))
        assert texts[-1].endswith(reply.text)
        assert f"reward {reply.reward:+.2f}" in last[place]
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        page.main([])
    assert "gradio is missing; pip install -r tools/page-req" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_visitors_at_once_are_all_answered(talk):  # noqa: F811
    pytest.importorskip("gradio", reason="pip install -r tools/page-requirements.txt")
    from gradio_client import Client

    made, prompts = page.build(talk), ["the film", "<b>bold</b>", " "] * 20
    address = made.launch(server_name="127.0.0.1", prevent_thread_lock=True)[1]

    def visit(number):
        asked = prompts[number], 1.0, number
        return Client(address, verbose=False).predict(*asked, api_name="/write")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(visit, range(60)))
    made.close()
    words = ["reward", "&lt;b&gt;bold&lt;/b&gt;", "the prompt is empty; write the"] * 20
    pairs = zip(answers, words, strict=True)
    assert all(word in text for answer, word in pairs for text in answer)
