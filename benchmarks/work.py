"""The work that every loop gets, and the watch that times it."""

import contextlib
import dataclasses
import functools
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from utils.data import clean, load_reviews, load_tokenizer, make_prompts, pad, tokenize
from utils.models import (
    RewardModel,
    freeze,
    hidden_states,
    load_causal_lm,
    vocabulary_logits,
)
from utils.practice import tiny_world
from utils.rollout import (
    has_ended,
    normalise_scores,
    response_logprobs,
    sample_responses,
    squash,
)
from utils.settings import Settings
from utils.training import get_device, seed_everything

try:
    import resource
except ImportError:  # on Windows
    resource = None

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
    """Models, prompts and settings; the same for every loop, in every process."""

    model: str  # folder or name of the policy, which is also the reference
    reward_model: str  # folder of a reward model, or a model to put a fresh head on
    dataset: str
    settings: Settings
    seed: int = 0
    never_ends: bool = False  # the stop token is one that the model never writes

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
        return freeze(RewardModel.from_pretrained(self.reward_model).to(self.device))

    @functools.cached_property
    def reviews(self):
        """The splits of the data set."""
        named = dataclasses.replace(self.settings, dataset_name=self.dataset)
        return load_reviews(named)

    def rows(self, split, n, min_tokens=2):
        """Token ids and labels of the first n long enough reviews of a split."""
        reviews, settings = self.reviews[split], self.settings
        if n:  # some are too short to be used
            reviews = reviews.select(range(min(4 * n, len(reviews))))
        ids = tokenize(reviews["sentence"], self.tokenizer, settings.max_tokens)
        pairs = zip(ids, reviews["label"], strict=True)
        return [(row, y) for row, y in pairs if len(row) >= min_tokens][:n]

    @functools.cached_property
    def prompts(self):
        """All training prompts, shuffled."""
        sentences = list(self.reviews["train"]["sentence"])
        return make_prompts(sentences, self.tokenizer, self.settings, self.seed)

    def prompts_of(self, step):
        """The prompts of one rollout."""
        size = self.settings.ppo_rollout_size
        places = range(step * size, (step + 1) * size)
        return [self.prompts[i % len(self.prompts)] for i in places]

    @functools.cached_property
    def held_out(self):
        """Prompts that no loop trains on."""
        sentences = list(self.reviews["validation"]["sentence"])
        seen = {clean(sentence) for sentence in self.reviews["train"]["sentence"]}
        options = {"seed": 0, "exclude": seen}
        prompts = make_prompts(sentences, self.tokenizer, self.settings, **options)
        return prompts[: self.settings.eval_prompts]

    @functools.cached_property
    def unlikely(self):
        """The two tokens that are least likely to follow the prompts."""
        ids, mask = pad(self.prompts[:64], 0, side="left")
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.no_grad():
            last = hidden_states(self.reference.base_model, ids, mask)[:, -1]
            probs = vocabulary_logits(self.reference, last).softmax(-1).mean(0)
        known = probs[: len(self.tokenizer)]  # a model may have words to spare
        return known.topk(2, largest=False).indices.tolist()

    @functools.cached_property
    def stop_id(self):
        """The token that closes a response."""
        return self.unlikely[0] if self.never_ends else self.tokenizer.eos_token_id

    @torch.no_grad()
    def sample(self, lm, prompts):
        """Sampled texts (ids, attention mask, response mask) in pieces."""
        generator = torch.Generator(self.device).manual_seed(1)
        settings, size = self.settings, self.settings.ppo_minibatch_size
        for start in range(0, len(prompts), size):
            padded = pad(prompts[start : start + size], self.stop_id, side="left")
            ids, mask = (x.to(self.device) for x in padded)
            options = (self.stop_id, settings.max_new_tokens, settings.temperature)
            yield sample_responses(lm, ids, mask, *options, generator)

    @functools.cached_property
    def scale(self):
        """Mean and spread of the raw score over texts of the reference."""
        texts = self.sample(self.reference, self.prompts[:256])
        raw = torch.cat([self.reward(*text[:2]) for text in texts])
        return raw.mean().item(), raw.std().item()

    def normalised(self, raw, ended):
        """The score that PPO maximises, from the reward model's logit."""
        if self.never_ends:  # no text would ever be rewarded
            ended = torch.ones_like(ended)
        return normalise_scores(
            raw, ended, *self.scale, self.settings.missing_eos_score
        )

    def score(self, ids, attention_mask, mask):
        """Raw and normalised score of sampled texts."""
        raw = self.reward(ids, attention_mask)
        return raw, self.normalised(raw, has_ended(ids, mask, self.stop_id))

    @torch.no_grad()
    def judge(self, lm):
        """Mean of 2 sigmoid(raw logit) - 1 and of the KL over the held-out prompts."""
        rewards, kl, training = [], 0.0, lm.training
        lm.eval()
        for ids, attention_mask, mask in self.sample(lm, self.held_out):
            rewards.append(squash(self.reward(ids, attention_mask)))
            ours, theirs = (
                response_logprobs(model, ids, attention_mask, mask)
                for model in (lm, self.reference)
            )
            kl += (ours - theirs).sum().item()
        lm.train(training)
        return torch.cat(rewards).mean().item(), kl / len(self.held_out)


class Enough(Exception):
    """Raised by the watch when a loop has done all that was asked of it."""


@dataclass
class Watch:
    """Seconds by phase, rollout by rollout; what it judges costs no time.

    A loop ends when it has made `rollouts`, has reached `goal`, or has taken `limit`
    seconds. It is judged whenever `every` further episodes are done; 0: never.
    """

    work: Work
    rollouts: int = 0
    every: int = 0
    goal: float = 2.0
    limit: float = float("inf")
    done: list = dataclasses.field(default_factory=list)  # Counter of each rollout
    judged: list = dataclasses.field(default_factory=list)
    peaks: list = dataclasses.field(default_factory=list)  # GiB, after each rollout

    def __post_init__(self):
        self.phase, self.phases, self.since = "log-probs", Counter(), self.now()
        if self.every:
            self.look(self.work.reference)

    def now(self):
        """The time when all that was asked of a GPU is done."""
        if self.work.device.type == "cuda":
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

    @property
    def seconds(self):
        """What all finished rollouts took."""
        return sum(phases.total() for phases in self.done)

    @property
    def episodes(self):
        """How many responses all finished rollouts hold."""
        return len(self.done) * self.work.settings.ppo_rollout_size

    def look(self, lm):
        """Judge a policy."""
        reward, kl = self.work.judge(lm)
        found = {"seconds": self.seconds, "episodes": self.episodes}
        self.judged.append({**found, "reward": reward, "kl": kl})

    def rollout_done(self, lm):
        """One rollout and its update are done."""
        self.switch("log-probs")
        self.done.append(self.phases)
        self.peaks.append(peak_memory(self.work.device))
        late = self.seconds > self.limit
        if self.every and (late or self.episodes % self.every == 0):
            self.look(lm)  # also when it is stopped: what it reached by then counts
        at_goal = self.judged and self.judged[-1]["reward"] >= self.goal
        if len(self.done) == self.rollouts or at_goal or late:
            raise Enough
        self.phases, self.since = Counter(), self.now()

    def report(self):
        """What was found; the first rollout warms up and counts for no speed."""
        return {
            "rollouts": [dict(phases) for phases in self.done],
            "judged": self.judged,
            "memory": self.peaks[-1],
            "peaks": self.peaks,
        }


def peak_memory(device) -> float:
    """The most memory that this process (on a GPU: its tensors) ever held, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def run_ppo(module, work: Work, **limits) -> dict:
    """Time a module's PPO loop on the work."""
    seed_everything(work.seed)
    _ = work.prompts, work.stop_id, work.scale  # load and make before the clock runs
    watch = Watch(work, **limits)
    with contextlib.suppress(Enough):
        module.ppo(work, watch)
    return watch.report()
