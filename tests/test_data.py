import pytest
import torch
from tokenizers.processors import TemplateProcessing

from utils import data
from utils.settings import TINY


@pytest.fixture(scope="module")
def tokenizer(world):
    return data.load_tokenizer(str(world / "model"))


def test_tokenize_strips_and_ends_in_eos(tokenizer):
    eos = tokenizer.eos_token_id
    (row,) = data.tokenize(["never dull "], tokenizer, max_tokens=10)
    assert row[-1] == eos and row.count(eos) == 1
    assert tokenizer.decode(row[:-1]) == "never dull"


def test_tokenize_cuts_long_texts_and_keeps_the_eos(tokenizer):
    (row,) = data.tokenize(["the plot is dull . " * 9], tokenizer, max_tokens=6)
    assert len(row) == 6 and row[-1] == tokenizer.eos_token_id


TEMPLATES = {"nothing": "$A", "before": "{} $A", "behind": "$A {}", "both": "{} $A {}"}


@pytest.fixture(params=TEMPLATES)
def adding(request, world):
    """Tokenizers that put EOS before a text (OPT's), behind it, both, or nowhere."""
    tokenizer = data.load_tokenizer(str(world / "model"))
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    template = TEMPLATES[request.param].replace("{}", eos[0])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[eos]
    )
    tokenizer.front = [eos[1]] if template.startswith(eos[0]) else []
    return tokenizer


def test_what_a_tokenizer_adds_is_no_fault_of_the_text(adding, tokenizer):
    eos, words = adding.eos_token_id, tokenizer("never dull")["input_ids"]
    assert eos not in words
    (row,) = data.tokenize(["never dull "], adding, max_tokens=10)
    assert row == [*adding.front, *words, eos]
    (row,) = data.tokenize(["the plot is dull . " * 9], adding, max_tokens=6)
    assert len(row) == 6 and row[-1] == eos and row[: len(adding.front)] == adding.front
    assert data.encode(["never dull"], adding) == [[*adding.front, *words]]
    for text in (f"never {adding.eos_token} dull", adding.eos_token):
        with pytest.raises(ValueError, match="holds the EOS token"):
            data.tokenize([text], adding, max_tokens=10)


def test_prompts_begin_as_the_tokenizer_begins_and_never_end_in_eos(adding, tokenizer):
    words = ["funny", "dull", "superb", "witty", "bland", "clever", "moving", "tender"]
    texts = [f"the acting is {a} , but the plot is {b} ." for a in words for b in words]
    prompts = data.make_prompts(texts, adding, TINY, seed=0)
    plain = data.make_prompts(texts, tokenizer, TINY, seed=0)
    assert prompts == [adding.front + prompt for prompt in plain]
    assert not any(adding.eos_token_id in prompt for prompt in plain)


def test_a_tokenizer_that_adds_nothing_gives_what_it_always_gave(tokenizer):
    """The rows and prompts of every run so far, worked out as they were then."""
    texts = ["never dull ", "the acting is superb , but the plot is dull ."]
    plain = tokenizer([text.strip() for text in texts])["input_ids"]
    rows = data.tokenize(texts, tokenizer, max_tokens=8)
    assert rows == [row[:7] + [tokenizer.eos_token_id] for row in plain]
    assert data.tokens_in_front(tokenizer) == []


def test_pad_by_hand():
    ids, mask = data.pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = data.pad([[5, 6, 7], [8]], pad_id=9, side="left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="'middle'"):
        data.pad([[1]], 0, side="middle")


def test_the_label_of_the_closing_eos_is_kept():
    eos = 0
    ids, mask = data.pad([[5, 6, eos], [8, eos]], pad_id=eos)
    assert data.lm_labels(ids, mask).tolist() == [[5, 6, eos], [8, eos, -100]]


def test_batches_hold_every_row_once_and_little_padding():
    lengths = torch.randint(2, 60, (5003,), generator=torch.manual_seed(0)).tolist()
    batches = data.batch_indices(lengths, 32, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(5003))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert 1 - sum(lengths) / padded < 0.10
    assert batches == data.batch_indices(lengths, 32, seed=1)
    assert batches != data.batch_indices(lengths, 32, seed=2)
    # shuffled: short batches do not all come first
    means = [sum(lengths[i] for i in b) / len(b) for b in batches]
    assert means != sorted(means)


def test_prompts_are_beginnings_of_long_sentences_only(tokenizer):
    long = "the acting is superb , but the plot is dull ."
    other = "the plot is dull , but the acting is superb ."
    sentences = ["never dull ", long + " ", other + " ", long + " "]
    for seed in range(20):
        (prompt,) = data.make_prompts(sentences, tokenizer, TINY, seed, exclude={other})
        assert TINY.prompt_min_tokens <= len(prompt) <= TINY.prompt_max_tokens
        assert long.startswith(tokenizer.decode(prompt))


def test_prompt_lengths_cover_their_range(tokenizer):
    words = ["funny", "dull", "superb", "witty", "bland", "clever", "moving", "tender"]
    sentences = [
        f"the acting is {a} , but the plot is {b} ." for a in words for b in words
    ]
    prompts = data.make_prompts(sentences, tokenizer, TINY, seed=0)
    assert {len(p) for p in prompts} == set(range(2, 8))
    assert prompts == data.make_prompts(sentences, tokenizer, TINY, seed=0)


def test_no_long_sentence_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="none of the 1 sentences has 9 words"):
        data.make_prompts(["never dull"], tokenizer, TINY, seed=0)


def pair(prompt, chosen, rejected=" is dull ."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_pair_as_a_model_reads_it(adding, tokenizer):
    eos = adding.eos_token_id
    prompt, chosen, rejected = data.pair_tokens(
        pair("the plot", " is fine ."), adding, 9
    )
    bare = [tokenizer(text)["input_ids"] for text in ("the plot", " is fine .")]
    assert prompt == [*adding.front, *bare[0]] and chosen == [*bare[1], eos]
    assert tokenizer.decode(rejected[:-1]) == " is dull ." and rejected[-1] == eos


@pytest.mark.parametrize(
    "one, says",
    [
        (pair("the pl", "ot is fine ."), "cut within a token of prompt . chosen: 'the"),
        (pair("the pl", " is", "ot is dull"), "within a token of prompt . rejected"),
        (
            pair("the plot", " is<|endoftext|>"),
            "the EOS token .*endoftext.* in 'chosen'",
        ),
        (pair("the plot", " is dull" * 9), "has 21 tokens in prompt . chosen, more th"),
    ],
)
def test_a_pair_that_would_be_read_otherwise_is_named(tokenizer, one, says):
    with pytest.raises(ValueError, match=says):
        data.pair_tokens(one, tokenizer, 20)
    check = data.pair_check(tokenizer, 20)
    assert check(one).startswith(("has a prompt", "holds the EOS", "has 21"))
    assert check(pair("the plot", " is fine .")) == ""
