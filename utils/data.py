"""From a data set of labelled sentences to batches of token ids and prompts."""

import random

import datasets
import torch
from torch import Tensor
from transformers import AutoTokenizer

from utils import reviews
from utils.inputs import check_tokenizer, loading


def load_tokenizer(name: str):
    """The tokenizer of a model on the hub or in a local folder.

    GPT-2 has no padding token and none is set: `pad` fills with any id and says in a
    mask what is real, so that the closing EOS is never mistaken for padding. Raises
    ValueError if the tokenizer has no EOS.
    """
    with loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    check_tokenizer(tokenizer, name)
    return tokenizer


def load_reviews(settings) -> datasets.DatasetDict:
    """The splits `train` and `validation`, with the columns `sentence` and `label`.

    A label is 1 (positive) or 0 (negative); each split has both. `dataset_name` is a
    name on the hub, a folder or a file, and the settings beside it say what splits,
    columns and labels are called there. Without a validation split, a share of train
    is kept back. Of what is left, `train_rows` are drawn, the same for every seed.
    Raises ValueError, naming the setting, if anything does not fit.
    """
    found = reviews.read_dataset(settings.dataset_name, settings.dataset_config)
    splits = reviews.choose_splits(found, settings)
    columns = reviews.sentences_and_labels(splits, settings)
    if "validation" not in columns:
        columns = reviews.keep_back(columns["train"], settings)
        print(
            f"no rows in a split {settings.validation_split!r} of {list(found)}: of "
            f"{settings.train_split}, {len(columns['validation']['label']):,} rows are "
            f"kept back for it, and {len(columns['train']['label']):,} left"
        )
    columns["train"] = reviews.drawn(columns["train"], settings)
    reviews.check_both_labels(columns, settings)
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows) for name, rows in columns.items()}
    )


def clean(sentence: str) -> str:
    """The sentence without the spaces around it.

    SST-2's training sentences end in a space; a model that sees it there learns the
    space, not EOS, as its sign to stop.
    """
    return sentence.strip()


def tokens_in_front(tokenizer) -> list[int]:
    """What a tokenizer puts before every text: a BOS, or (as GPT-2's) nothing."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    fits = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return whole[: next(fits, 0)]


def encode(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each text with what the tokenizer puts in front, and no EOS behind.

    Some tokenizers would put one there; a prompt must have none.
    """
    front = tokens_in_front(tokenizer)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [front + row for row in rows]


def tokenize(sentences: list[str], tokenizer, max_tokens: int) -> list[list[int]]:
    """Token ids of each cleaned sentence, ending in EOS, at most max_tokens long.

    They begin as the tokenizer begins every text, be it with EOS. Raises ValueError if
    a sentence holds EOS already: a text would end in its middle.
    """
    rows = encode([clean(sentence) for sentence in sentences], tokenizer)
    front = len(tokens_in_front(tokenizer))
    for row, sentence in zip(rows, sentences, strict=True):
        if tokenizer.eos_token_id in row[front:]:
            raise ValueError(
                f"the sentence {sentence[:60]!r} holds the EOS token "
                f"{tokenizer.eos_token!r}; take it out of the data set"
            )
    return [row[: max_tokens - 1] + [tokenizer.eos_token_id] for row in rows]


def pad(
    rows: list[list[int]], pad_id: int, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor (B, L), and the mask (B, L): 1 on real tokens.

    Raises ValueError if the side is not left or right.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be left or right, got {side!r}")
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(width - len(row), None)
        input_ids[i, real] = torch.tensor(row)
        attention_mask[i, real] = 1
    return input_ids, attention_mask


def lm_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What a language model should predict: the ids, and -100 (ignored) on padding.

    The mask comes from the lengths. One built from `input_ids == eos` would drop the
    label of the closing EOS, and the model would never learn to stop.
    """
    return input_ids.masked_fill(attention_mask == 0, -100)


def batch_indices(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """Shuffled batches of indices, in which rows of like length stand together.

    The rows are shuffled, sorted by length within blocks of 50 batches, cut into
    batches, and the batches shuffled: little padding, and still a random order. The
    last batch may be smaller.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    block = 50 * batch_size
    batches = []
    for start in range(0, len(order), block):
        rows = sorted(order[start : start + block], key=lengths.__getitem__)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def make_prompts(
    sentences: list[str], tokenizer, settings, seed: int, exclude=frozenset()
) -> list[list[int]]:
    """The first few tokens of each long enough sentence, shuffled.

    A sentence counts if it has at least `prompt_min_words` words and does not stand
    in `exclude`; each gives one prompt of `prompt_min_tokens` to `prompt_max_tokens`
    tokens, and before them what the tokenizer puts in front of every text. Raises
    ValueError if none is left.
    """
    rng = random.Random(seed)
    unique = dict.fromkeys(clean(sentence) for sentence in sentences)
    long = [
        s
        for s in unique
        if len(s.split()) >= settings.prompt_min_words and s not in exclude
    ]
    if not long:
        raise ValueError(
            f"none of the {len(sentences)} sentences has {settings.prompt_min_words} "
            "words; lower prompt_min_words"
        )
    rng.shuffle(long)
    lengths = (settings.prompt_min_tokens, settings.prompt_max_tokens)
    front = len(tokens_in_front(tokenizer))
    return [row[: front + rng.randint(*lengths)] for row in encode(long, tokenizer)]


def pair_tokens(
    pair: dict[str, str], tokenizer, max_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a pair's prompt, and of both responses with EOS behind them.

    Each text is tokenised as a whole, as a model would read it. Raises ValueError if it
    then does not begin with the prompt's own tokens: the policy would be asked for
    another text than the one that was judged. Also if a response holds EOS, or if a
    text has more than max_tokens.
    """
    prompt, *texts = encode(
        [pair["prompt"], *(pair["prompt"] + pair[x] for x in ("chosen", "rejected"))],
        tokenizer,
    )
    responses = []
    for name, text in zip(("chosen", "rejected"), texts, strict=True):
        response = text[len(prompt) :]
        if text[: len(prompt)] != prompt or not response:
            raise ValueError(
                f"has a prompt that is cut within a token of prompt + {name}: "
                f"{pair['prompt'][-20:]!r} and {pair[name][:20]!r}"
            )
        if tokenizer.eos_token_id in response:
            raise ValueError(f"holds the EOS token {tokenizer.eos_token!r} in {name!r}")
        if len(text) >= max_tokens:
            raise ValueError(
                f"has {len(text) + 1} tokens in prompt + {name}, more than {max_tokens}"
            )
        responses.append([*response, tokenizer.eos_token_id])
    return prompt, *responses


def pair_check(tokenizer, max_tokens: int):
    """A `check` for `read_pairs`: what `pair_tokens` has against a pair, or nothing."""

    def check(pair):
        try:
            pair_tokens(pair, tokenizer, max_tokens)
        except ValueError as error:
            return str(error)
        return ""

    return check
