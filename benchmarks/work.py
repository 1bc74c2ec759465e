"""The work that every loop gets, and the watch that times it."""

import contextlib
import dataclasses
import functools
import random
import time
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from more.common import peak_memory
from practice import tiny_world
from utils.data import load_reviews, load_tokenizer, make_prompts, pad, tokenize
from utils.models import (
    RewardModel,
    freeze,
    hidden_states,
    load_causal_lm,
    vocabulary_logits,
)
from utils.rollout import sample_responses
from utils.settings import Settings
from utils.training import get_device, seed_everything

GPT2_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256}
GPT2_WORDS = 50257


def build_default(folder):
    """A randomly initialised model in GPT-2's shape, and generated reviews.

    The tokenizer is the tiny world's, the vocabulary GPT-2's in size: most of its
    words never occur, and all of them cost.
    """
    model, dataset = folder / "model", folder / "dataset"
    if not (dataset / "data").exists():
        rng = random.Random(0)
        documents = [tiny_world.write_document(rng) for _ in range(3000)]
        tokenizer = tiny_world.train_tokenizer(documents)
        eos = tokenizer.eos_token_id
        ends = {"bos_token_id": eos, "eos_token_id": eos}
        config = GPT2Config(vocab_size=GPT2_WORDS, **GPT2_SHAPE, **ends)
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        (dataset / "data").mkdir(parents=True)
        for split, rows in tiny_world.make_dataset().items():
            rows.to_parquet(dataset / "data" / f"{split}-00000-of-00001.parquet")
    return str(model), str(dataset)


@dataclass(frozen=True)
class Work:
    """Models, prompts and settings; the same for every loop, in every process.

    No response ends before its last slot: the stop token is one that the model never
    writes. So all loops have the same number of tokens to work on.
    """

    model: str  # folder or name: the policy, the reference, and below a fresh head
    dataset: str
    settings: Settings
    seed: int = 0

    @functools.cached_property
    def device(self):
        """A GPU if there is one, or what the settings name."""
        return get_device(self.settings)

    @functools.cached_property
    def tokenizer(self):
        """The policy's tokenizer."""
        return load_tokenizer(self.model)

    @functools.cached_property
    def reference(self):
        """The frozen model that KL is measured against."""
        return freeze(load_causal_lm(self.model, self.device))

    @functools.cached_property
    def reward(self):
        """The frozen reward model."""
        torch.manual_seed(0)
        return freeze(RewardModel.from_pretrained(self.model).to(self.device))

    @functools.cached_property
    def reviews(self):
        """The training split of the data set."""
        named = dataclasses.replace(self.settings, dataset_name=self.dataset)
        return load_reviews(named)["train"]

    def rows(self, n, min_tokens):
        """Token ids and labels of the first n long enough reviews."""
        reviews = self.reviews.select(range(min(4 * n, len(self.reviews))))
        most = self.settings.max_tokens
        ids = tokenize(reviews["sentence"], self.tokenizer, most)
        pairs = zip(ids, reviews["label"], strict=True)
        return [(row, y) for row, y in pairs if len(row) >= min_tokens][:n]

    @functools.cached_property
    def prompts(self):
        """All prompts, shuffled."""
        sentences = list(self.reviews["sentence"])
        return make_prompts(sentences, self.tokenizer, self.settings, self.seed)

    def prompts_of(self, step):
        """The prompts of one rollout."""
        size = self.settings.ppo_rollout_size
        places = range(step * size, (step + 1) * size)
        return [self.prompts[i % len(self.prompts)] for i in places]

    @functools.cached_property
    def unlikely(self):
        """The two tokens that are least likely to follow the prompts."""
        padded = pad(self.prompts[:64], 0, side="left")
        texts = [x.to(self.device) for x in padded]
        with torch.no_grad():
            last = hidden_states(self.reference.base_model, *texts)[:, -1]
            probs = vocabulary_logits(self.reference, last).softmax(-1).mean(0)
        known = probs[: len(self.tokenizer)]  # a model may have words to spare
        return known.topk(2, largest=False).indices.tolist()

    @property
    def stop_id(self):
        """The token that would close a response."""
        return self.unlikely[0]

    @functools.cached_property
    @torch.no_grad()
    def scale(self):
        """Mean and spread of the raw score over texts of the reference."""
        generator = torch.Generator(self.device).manual_seed(1)
        settings, raw = self.settings, []
        for start in range(0, 256, size := settings.ppo_minibatch_size):
            some = self.prompts[start : start + size]
            prompts = (x.to(self.device) for x in pad(some, self.stop_id, side="left"))
            options = (self.stop_id, settings.max_new_tokens, settings.temperature)
            ids, mask, _ = sample_responses(
                self.reference, *prompts, *options, generator
            )
            raw.append(self.reward(ids, mask))
        raw = torch.cat(raw)
        return raw.mean().item(), raw.std().item()

    def score(self, ids, attention_mask, mask):
        """Raw and normalised score of sampled texts."""
        raw = self.reward(ids, attention_mask)
        return raw, self.normalised(raw)

    def normalised(self, raw):
        """The score that PPO maximises, from the reward model's logit."""
        mean, std = self.scale
        return (raw - mean) / std


class Enough(Exception):
    """Raised by the watch when a loop has made all the rollouts it was asked for."""


@dataclass
class Watch:
    """Seconds by phase, rollout by rollout."""

    device: torch.device
    rollouts: int
    done: list = dataclasses.field(default_factory=list)  # Counter of each rollout

    def __post_init__(self):
        self.phase, self.phases, self.since = "log-probs", Counter(), self.now()

    def now(self):
        """The time when all that was asked of a GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def switch(self, phase):
        """From now on time goes to this phase; returns the one before."""
        now, before = self.now(), self.phase
        self.phases[before] += now - self.since
        self.phase, self.since = phase, now
        return before

    def timed(self, phase, function):
        """The function, whose time goes to this phase."""

        def wrapped(*arguments, **options):
            before = self.switch(phase)
            try:
                return function(*arguments, **options)
            finally:
                self.switch(before)

        return wrapped

    def rollout_done(self):
        """One rollout and its update are done."""
        self.switch("log-probs")
        self.done.append(self.phases)
        if len(self.done) == self.rollouts:
            raise Enough
        self.phases = Counter()


def run_ppo(loop, work: Work, rollouts: int, watch=Watch) -> dict:
    """Time a PPO loop on the work; its first rollout warms up."""
    seed_everything(work.seed)
    _ = work.prompts, work.scale  # load and make before the clock runs
    watch = watch(work.device, rollouts)
    with contextlib.suppress(Enough):
        loop(work, watch)
    found = [dict(phases) for phases in watch.done]
    return {"rollouts": found, "memory": peak_memory(work.device)}
