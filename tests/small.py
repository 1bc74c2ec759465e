"""A small model, and what PPO does with it, for the tests of every room."""

import dataclasses
from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from utils.models import PolicyWithValueHead, freeze
from utils.rollout import has_ended, normalise_scores
from utils.settings import TINY
from utils.training import GuardedOptimizer

EOS, PROMPTS = 0, [[5, 6, 7, 8], [3], [4, 2]]
sizes = {"ppo_episodes": 48, "ppo_rollout_size": 24, "ppo_minibatch_size": 12}
sizes |= {"ppo_micro_batch_size": 12, "max_new_tokens": 6}
SETTINGS = dataclasses.replace(TINY, **sizes)


def t(*rows):
    """Rows of numbers as a tensor in float64."""
    return torch.tensor(rows, dtype=torch.float64)


def small_lm(vocabulary=10, seed=0, n_positions=32):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": n_positions}
    ids = {"vocab_size": vocabulary, "bos_token_id": EOS, "eos_token_id": EOS}
    model = GPT2LMHeadModel(GPT2Config(**ids, **sizes))
    torch.manual_seed(10 + seed)  # here: what is drawn above is the library's affair
    for weight in model.parameters():  # far from uniform, so that errors show
        torch.nn.init.normal_(weight, std=0.3)
    return model.double().eval()


def small_tokenizer(words="abcdefghi"):
    """One of `small_lm`'s ten words: EOS, and a letter each."""
    vocabulary = {word: i for i, word in enumerate(["EOS", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="EOS"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="EOS")


def make_policy():
    policy = PolicyWithValueHead(small_lm()).double().eval()
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    return policy


def score(ids, attention, mask):
    """1 for each token 3 in the response, if it ended; raw and normalised."""
    raw = ((ids[:, -mask.shape[1] :] == 3) & mask.bool()).sum(1).double()
    return raw, normalise_scores(raw, has_ended(ids, mask, EOS), 0.0, 1.0, -1.0)


def collect(loop, policy, reference=None, settings=SETTINGS, by=score):
    """A rollout with its advantages, scored by this function."""
    models = (policy, reference or freeze(small_lm(seed=1)), by)
    prompts, generator = (PROMPTS * 8, EOS), torch.Generator().manual_seed(0)
    rollout = loop["collect_rollout"](*models, *prompts, settings, generator)
    return loop["ppo_advantages"](rollout, settings, 0.1)


def guarded(policy, optimizer=None, settings=SETTINGS, scaler=None):
    optimizer = optimizer or torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-5)
    made = GuardedOptimizer(policy, optimizer, settings)
    made.scaler = scaler or made.scaler
    return made


def update(loop, policy, rollout, settings=SETTINGS, optimizer=None, loss=None):
    optimizer = optimizer or guarded(policy, settings=settings)
    models, generator = (policy, optimizer), torch.Generator().manual_seed(0)
    how = partial(loop["gradients"], loss=loss or loop["ppo_loss"])
    return loop["ppo_update"](*models, rollout, settings, generator, backward=how)


def go(loop, run, models, settings, *pause):
    how = (loop["ppo_advantages"], loop["ppo_update"])
    loop["train"](run, *models, settings, *how, *pause)
