"""From labelled sentences to batches of token ids and prompts."""

import contextlib
import os
import random
import re
from pathlib import Path

import datasets
import torch
from huggingface_hub import constants, repo_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from practice import own_data

# By words in the class names of an error and of its causes, or in what the first said
REMEDIES = {
    r"PermissionError|Read-only": (
        "ask its owner for the permission, or set HF_HOME to a place of yours"
    ),
    r"No space|[Qq]uota|enough disk": "make room",
    r"MemoryError": "free memory, or name a smaller one",
    r"vailable configs|BuilderConfig": "name one of these with dataset_config",
}
OF_A_FILE = {r"": "make it anew, or name another"}
OF_THE_HUB = {
    r"GatedRepo|gated dataset|'403": (
        "accept its terms on the hub, and set an HF_TOKEN that may read it"
    ),
    r"'401": "correct the name, or set, renew or unset HF_TOKEN",
    r"UnicodeEncodeError": "correct HF_TOKEN",
    r"certificate|CERTIFICATE": (
        "correct the clock, or name your company's certificate in SSL_CERT_FILE"
    ),
    r"ImportError|ModuleNotFound": "install it",
    r"'407|[Pp]roxy": "correct HTTPS_PROXY",
    r"[Oo]ffline|outgoing": "unset HF_HUB_OFFLINE",
    r"KeyError": "update the library, or name another",
    r"Connect|Timeout|Protocol|'429|'50\d": (
        "connect or try again later, or take the preset 'tiny'"
    ),
    r"'404|NotFound": "correct the name",
    r"": f"name another, or delete what {constants.HF_HOME} holds of it",
}


def causes(error: BaseException) -> list[BaseException]:
    """An error and what led to it, the first cause last."""
    before = None if error.__suppress_context__ else error.__context__
    before = error.__cause__ or before
    return [error, *causes(before)] if before else [error]


def innermost(error: BaseException) -> str:
    """The first cause of an error, in its own words, on one line."""
    error = causes(error)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def loading(what: str, name):
    """Turn what a library raises while it loads `name` into an OSError of one sentence.

    If the hub does not answer, the libraries are told that they are offline, so that
    they take what is in the cache: they would ask again for minutes.
    """
    name, refused, offline = str(name), None, constants.HF_HUB_OFFLINE
    here = os.path.exists(name)
    is_path = name.startswith(("/", ".")) or name.count("/") > 1
    is_path |= not own_data.FORMATS.keys().isdisjoint(Path(name).suffixes)
    try:
        if is_path and not here:
            raise FileNotFoundError("it is not on this machine")
        if not here and not offline:
            try:
                kind = "dataset" if what == "data set" else "model"
                repo_info(name, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except Exception as error:
                refused = error  # the hub refuses it, or cannot be reached
                constants.HF_HUB_OFFLINE = "HTTPStatus" not in innermost(error)
        yield
    except Exception as error:
        found, cause = causes(refused or error), innermost(refused or error)
        said = " ".join([*(type(one).__name__ for one in found), cause])
        known = REMEDIES | (OF_A_FILE if here else OF_THE_HUB)
        remedy = next(x for words, x in known.items() if re.search(words, said))
        raise OSError(f"cannot load the {what} {name!r} ({cause}); {remedy}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def load_tokenizer(name: str):
    """The tokenizer of a model on the hub or in a folder.

    GPT-2 has no padding token and none is set: `pad` fills with any id and says in a
    mask what is real, so that the closing EOS is never mistaken for padding. Raises
    ValueError if the tokenizer has no EOS, or no words.
    """
    with loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    eos, words = tokenizer.eos_token, len(tokenizer) - len(tokenizer.all_special_ids)
    if eos is None or words < 1:
        said = f"{str(name)!r} has {words} words and the EOS {eos!r}"
        raise ValueError(f"the tokenizer of {said}; add its files, or name another")
    return tokenizer


def load_reviews(settings) -> datasets.DatasetDict:
    """The splits `train` and `validation`, with the columns `sentence` and `label`.

    A label is 1 (positive) or 0 (negative). Raises OSError if the data set cannot be
    loaded, and ValueError, naming the setting, if it is not what the settings say: see
    `practice/own_data.py`.
    """
    with loading("data set", name := settings.dataset_name):
        found = own_data.read_splits(name, settings.dataset_config)
    return own_data.as_reviews(found, settings)


def clean(sentence: str) -> str:
    """The sentence without the spaces around it.

    SST-2's training sentences end in a space; a model that sees it there learns the
    space, not EOS, as its sign to stop.
    """
    return sentence.strip()


def tokens_in_front(tokenizer) -> list[int]:
    """The tokens that a tokenizer puts before every text: a BOS, or none (GPT-2)."""
    ids = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    fits = (n for n in range(len(ids)) if ids[n : n + len(bare)] == bare)
    return ids[: next(fits, 0)]


def encode(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each text with what the tokenizer puts in front, and no EOS behind.

    Some tokenizers would close the text with EOS, but a prompt goes on.
    """
    front = tokens_in_front(tokenizer)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [front + row for row in rows]


def tokenize(sentences: list[str], tokenizer, max_tokens: int) -> list[list[int]]:
    """Token ids of each cleaned sentence, ending in EOS, at most max_tokens long.

    What the tokenizer puts in front may be EOS, too. Raises ValueError if a sentence
    holds EOS already: a text would end in its middle.
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


def pad(rows: list[list[int]], pad_id: int, side="right") -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor (B, L), and the mask (B, L): 1 on real tokens."""
    texts = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(text) for text in texts]
    options = {"batch_first": True, "padding_side": side}
    input_ids = pad_sequence(texts, padding_value=pad_id, **options)
    return input_ids, pad_sequence(ones, **options)


def lm_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What a language model should predict: the ids, and -100 (ignored) on padding.

    The mask comes from the lengths. One built from `input_ids == eos` would drop the
    label of the closing EOS, and the model would never learn to stop.
    """
    return input_ids.masked_fill(attention_mask == 0, -100)


def batch_indices(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """Shuffled batches of indices, in which rows of like length stand together.

    The rows are shuffled, sorted by length within blocks of 50 batches, cut into
    batches, and the batches shuffled: little padding, and still a random order. One
    batch of them may be smaller.
    """
    rng, block = random.Random(seed), 50 * batch_size
    order, batches = list(range(len(lengths))), []
    rng.shuffle(order)
    for start in range(0, len(order), block):
        rows = sorted(order[start : start + block], key=lengths.__getitem__)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def make_prompts(
    sentences: list[str], tokenizer, settings, seed: int, exclude=frozenset()
) -> list[list[int]]:
    """The first few tokens of each long enough sentence, shuffled.

    A prompt has two to `prompt_max_tokens` tokens, fewer where the last would cut a
    letter, and before them what the tokenizer puts in front of every text. A sentence
    is taken if it has at least `prompt_max_tokens` + 2 words and is not in `exclude`.
    Raises ValueError if none is left.
    """
    rng, longest = random.Random(seed), settings.prompt_max_tokens
    unique = dict.fromkeys(clean(sentence) for sentence in sentences)
    long = [s for s in unique if len(s.split()) >= longest + 2 and s not in exclude]
    if not long:
        raise ValueError(
            f"none of the {len(sentences)} sentences has {longest + 2} words and is "
            "new; lower prompt_max_tokens, or name other data"
        )
    rng.shuffle(long)
    front, prompts = len(tokens_in_front(tokenizer)), []
    for row in encode(long, tokenizer):
        prompt = row[: front + rng.randint(2, longest)]
        # Some letters (é, 好) are several tokens, of which the last may be cut off
        while tokenizer.decode(prompt[front:][-4:]).endswith("\ufffd"):
            prompt.pop()
        prompts += [prompt] if len(prompt) > front else []
    return prompts
