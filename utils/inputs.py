"""What a model and a data set must be like: checked as they are loaded.

Whatever is wrong with them is said in one sentence, with the remedy, before any
training starts.
"""

import contextlib
import re
import sys
import traceback
from pathlib import Path

import torch
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import constants, hf_hub_download, repo_info
from huggingface_hub.errors import EntryNotFoundError
from tqdm import tqdm

# Some write it behind the name, as was once the way
HINTS = {"data set": " (a configuration goes into the setting dataset_config)"}
# In what datasets says if a configuration is missing or unknown: those there are
CONFIGURATIONS = re.compile(r"config[^:]*: \[?(.+?)\]?$", re.IGNORECASE | re.MULTILINE)


def _first_line(error) -> str:
    said, _, _ = str(error).strip().partition("\n")  # of an empty one, nothing
    return f"{type(error).__name__}: {said[:200]}"


def kinds_of(error) -> set[str]:
    """The names of the classes of an error and of those that led to it.

    Names, since the hub's library has its network errors from httpx or from httpx2.
    """
    names = set()
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


def _is_here(what, name) -> bool:
    """Whether it lies on this machine: a folder, and a data set may be a file too."""
    return Path(name).is_dir() or (what == "data set" and Path(name).is_file())


def _unreachable(what, name):
    """What keeps the hub from being reached, or None; a refusal is an answer too.

    The libraries would find out late, or never: they wait for a model's description
    without end, and a minute, six times over, for each file that is not there yet.
    """
    if _is_here(what, name):
        return None
    repo_type = "dataset" if what == "data set" else "model"
    try:
        repo_info(name, repo_type=repo_type, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        if kinds_of(error) & {"ConnectError", "TimeoutException"}:
            return error
    return None


@contextlib.contextmanager
def _from_the_cache(only: bool):
    """Let the libraries load from their caches, without a word to the hub.

    transformers, datasets and tokenizers have one switch in common, which they read
    at each request: the constant of the hub's library. It is set back afterwards.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or only
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def loading(what: str, name):
    """Turn what a library raises while it loads `name` into one sentence.

    A hub that cannot be reached is not asked again: what is in the cache is loaded
    from there. Raises FileNotFoundError for a folder or a repository that is not there,
    ConnectionError if the hub cannot be reached, or refuses even after the library's
    own retries, and ValueError if what is there cannot be loaded.
    """
    name = str(name)
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and not _is_here(what, name):
        raise FileNotFoundError(
            f"there is no folder {name!r} to load the {what} from; correct the name, "
            f"or name a repository of the Hugging Face Hub{HINTS.get(what, '')}"
        )
    unreachable = _unreachable(what, name)
    try:
        with _from_the_cache(only=unreachable is not None):
            yield
    except Exception as error:
        raise _explained(error, what, name, unreachable) from error


class _TextBar(tqdm):
    """The hub's bar as text on stdout: it would be a widget, or pink, otherwise."""

    def __init__(self, *arguments, **options):
        options.pop("name", None)  # by which the library's own class can be disabled
        super().__init__(
            *arguments, **{**options, "desc": "Download", "file": sys.stdout}
        )


def download_weights(name: str):
    """Have the model `name` of the hub in the cache, with a bar while it comes.

    A model in several files is left to the library, which loads it without a bar.
    """
    if not Path(name).is_dir():
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, "model.safetensors", tqdm_class=_TextBar)


def _explained(error, what, name, unreachable):
    """The same error in one sentence, with the remedy."""
    kinds = kinds_of(error)
    found = what == "data set" and CONFIGURATIONS.search(str(error))
    if found and type(error) is ValueError:
        return ValueError(
            f"data set {name!r} is several in one; choose a configuration, one of "
            f"{found[1]}, with the setting dataset_config"
        )
    if _is_here(what, name):
        kind, remedy = "folder", "make it anew, or name another"
        if "EmptyDatasetError" in kinds:
            remedy = "put CSV, JSONL or Parquet files into it, or name another"
        if Path(name).is_file():
            kind, remedy = "file", "make it anew"
            if ".csv" in name.lower() or ".tsv" in name.lower():
                remedy = "save it in UTF-8, with the names of the columns on top"
        return ValueError(
            f"the {kind} {name!r} holds no {what} that can be loaded "
            f"({_first_line(error.__cause__ or error)}); {remedy}"
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return FileNotFoundError(
            f"the Hugging Face Hub has no public {what} {name!r}, and there is no "
            f"such folder here; correct the name{HINTS.get(what, '')}"
        )
    if kinds & {"EmptyDatasetError", "DataFilesNotFoundError"} or (
        isinstance(error, RuntimeError) and "scripts" in str(error)
    ):
        return ValueError(
            f"the data set {name!r} is not one of plain data files "
            f"({_first_line(error)}); name another, or a file or folder here"
        )
    unreadable = kinds & {"JSONDecodeError", "UnicodeDecodeError"}
    refused = kinds & {"HfHubHTTPError", "TransportError"} or isinstance(error, OSError)
    if refused and not unreadable:
        return ConnectionError(
            f"the {what} {name!r} could not be had from the Hugging Face Hub "
            f"({_first_line(unreachable or error)}); try again later, name a local "
            "folder, or take the preset 'tiny', which downloads nothing"
        )
    caches = constants.HF_HUB_CACHE
    if what == "data set":
        caches += f" and in {HF_DATASETS_CACHE}"
    return ValueError(
        f"the {what} {name!r} was downloaded, but cannot be loaded "
        f"({_first_line(error)}); delete what is left of it in {caches} and run "
        "this again"
    )


def check_tokenizer(tokenizer, name):
    """Raise ValueError unless it has words, and the token that ends a text."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What the library makes of a model of whose tokenizer no file is in the cache
        raise ValueError(
            f"the tokenizer of {str(name)!r} has no words, only "
            f"{tokenizer.all_special_tokens}; let the hub be reached for its files, or "
            "name another model"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {str(name)!r} has no EOS token, so no text could end; "
            "name another model, or set its eos_token and save it to a folder"
        )


def check_same_tokenizer(tokenizer, other, names=("sft", "reward_model")):
    """Raise ValueError if two models number the words differently."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"{names[0]} has a tokenizer of {len(tokenizer)} tokens and {names[1]} "
            f"another one, of {len(other)}, so the reward model would read other "
            "texts; make both from the same model_name"
        )


def check_context(config, settings, front: int = 0):
    """Raise ValueError if a text of these settings is longer than the model can read.

    `front` is how many tokens the tokenizer puts before each prompt. A model without
    a limit in its configuration passes.
    """
    limit = getattr(config, "max_position_embeddings", None)
    longest = {
        "max_tokens": settings.max_tokens,
        "prompt_max_tokens + max_new_tokens": (
            front + settings.prompt_max_tokens + settings.max_new_tokens
        ),
    }
    for name, tokens in longest.items():
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{name} is {tokens}, but {settings.model_name!r} reads {limit} tokens "
                f"at most; lower {name.split()[-1]}"
            )


@torch.no_grad()
def check_causal(lm, name):
    """Raise ValueError if a later token changes what the model says about earlier ones.

    That is tried out, on three tokens, and not read off the configuration.
    """
    ids = torch.tensor([[0, 1, 0], [0, 1, 1]], device=lm.device)
    mask, training = torch.ones_like(ids), lm.training
    states = lm.eval().base_model(input_ids=ids, attention_mask=mask)
    lm.train(training)
    early = states.last_hidden_state[:, :2]
    if (early[0] - early[1]).abs().max() > 1e-3:
        raise ValueError(
            f"{str(name)!r} looks at later tokens ({type(lm).__name__} is no causal "
            "language model), so it cannot write; name one such as 'gpt2'"
        )


@contextlib.contextmanager
def trying(name):
    """Turn what a model raises while it is tried out into one sentence, with its name.

    What `utils` says itself passes.
    """
    try:
        yield
    except Exception as error:
        *_, place = traceback.extract_tb(error.__traceback__)
        if Path(place.filename).parent == Path(__file__).parent:
            raise
        raise ValueError(
            f"{str(name)!r} cannot be read as this series reads a model "
            f"({_first_line(error)}); name another, such as 'gpt2'"
        ) from error


def check_alike(found, expected, name, fault: str):
    """Raise ValueError, with the fault, if two tensors differ by more than rounding.

    By a thousandth of the largest number: float32 rounds to a ten-millionth, which the
    layers of a large model make a hundred times as much.
    """
    off, largest = (found - expected).abs().max(), expected.abs().max()
    if not off <= 1e-3 * largest:
        raise ValueError(
            f"{str(name)!r} cannot be used here: {fault} (by {off:.2g} of "
            f"{largest:.2g}); name another model, such as 'gpt2'"
        )
