"""The work that every loop of PPO gets, and the watch that times it."""

import functools
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from utils.data import load_reviews, load_tokenizer, make_prompts
from utils.models import RewardModel, freeze, load_causal_lm
from utils.training import get_device


def build_model(folder: Path, **sizes):
    """A randomly initialised model in GPT-2's shape, with the tiny world's tokenizer.

    Its vocabulary is GPT-2's in size: most of its words never occur, and all of them
    cost.
    """
    tokenizer = load_tokenizer(folder.parent / "world/model")
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    sizes = sizes or {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256}
    config = GPT2Config(**sizes, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Work:
    """Models, prompts and settings; the same for every loop, in every process.

    No response ends before its last slot: the stop token is one that the model never
    writes. So all loops have the same number of tokens to work on.
    """

    def __init__(self, settings, seed: int):
        self.settings, self.seed = settings, seed
        self.device, self.model = get_device(settings), settings.model_name
        self.tokenizer = load_tokenizer(self.model)
        self.reference = freeze(load_causal_lm(self.model, self.device))
        torch.manual_seed(0)
        reward = RewardModel.from_pretrained(self.model)
        self.reward = freeze(reward.to(self.device))
        sentences = list(load_reviews(settings)["train"]["sentence"])
        self.prompts = make_prompts(sentences, self.tokenizer, settings, seed)
        # The bytes 0 and 1 as byte-level tokenizers write them; no text holds them
        self.stop_id, self.pad_id = self.tokenizer.convert_tokens_to_ids(["Ā", "ā"])
        set_seed(seed)

    def prompts_of(self, step: int) -> list[list[int]]:
        """The prompts of one rollout."""
        size = self.settings.ppo_rollout_size
        places = range(step * size, (step + 1) * size)
        return [self.prompts[i % len(self.prompts)] for i in places]

    def score(self, ids, attention_mask, mask):
        """Raw score of sampled texts, twice: it takes no time to normalise them."""
        raw = self.reward(ids, attention_mask)
        return raw, raw


class Watch:
    """Seconds by phase, rollout by rollout."""

    def __init__(self, device: torch.device):
        self.device, self.rollouts = device, []  # a Counter of each
        self.phase, self.phases, self.since = "log-probs", Counter(), self.now()

    def now(self) -> float:
        """The time when all that was asked of a GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def switch(self, phase: str) -> str:
        """From now on time goes to this phase; returns the one before."""
        now, before = self.now(), self.phase
        self.phases[before] += now - self.since
        self.phase, self.since = phase, now
        return before

    def timed(self, phase: str, function):
        """The function, whose time goes to this phase."""

        @functools.wraps(function)  # a run of PPO is known by the code under its names
        def wrapped(*arguments, **options):
            before = self.switch(phase)
            found = function(*arguments, **options)
            self.switch(before)
            return found

        return wrapped

    def rollout_done(self):
        """One rollout and its update are done."""
        self.switch("log-probs")
        self.rollouts.append(self.phases)
        self.phases = Counter()
