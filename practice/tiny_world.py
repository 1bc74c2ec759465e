"""A tiny world of film reviews, generated: a data set, a tokenizer, a small GPT-2.

The reviews come from a probabilistic grammar, so the sentiment, the grammaticality
and the probability of any text are exact. Negation ("never dull") and contrast
("funny but far too long") turn the sentiment of the words around, so that counting
words is not enough. The world is written as plain folders that load like any other
model and data set.
"""

import functools
import hashlib
import math
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import torch.nn.functional as F
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

# One rule a line: SYMBOL -> WEIGHT EXPANSION | WEIGHT EXPANSION ... Symbols are
# capitalised, words are not. A rule for `Symbol*` stands for two, `Symbol+` (positive)
# and `Symbol-`: in it, `Other=` has the same sentiment and `Other~` the opposite one.
REVIEW_GRAMMAR = """
Review* -> 8 Clause= . | 6 Phrase= | 7 Foil , but Clause= . | 4 although Foil , Clause= . | 3 Opening , Clause= . | 2 Clause= despite Hurdle .
Foil -> 4 Clause+ | 4 Clause- | 2 the Film is about Topic
Phrase* -> 6 a Adj= Film Tail | 3 not a Adj~ Film Tail | 2 Adj+ but Turn= | 2 Adj- but Turn= | 4 a Film that Deed= | 1 never Adj~ | 4 a Film full of Quality=
Clause* -> 6 the Aspect Be Judged= | 4 the Film Deed= | 3 the Person Deliver Quality= | 2 the Film Be a Adj= Kind
Judged* -> 6 Adj= | 4 Intensifier Adj= | 2 Adj= and Adj= | 4 Negation Adj~
Deed* -> 4 Verb= Audience | 2 never Verb~ Audience | 4 Have Quality= | 3 Lack Quality~
Have -> 1 offers | 1 brings | 1 has
Turn+ -> 2 Intensifier Adj+ | 1 never Adj-
Turn- -> 2 Intensifier Adj- | 1 never Adj+ | 2 far too Excess
Lack -> 1 lacks | 1 avoids | 1 has no
Deliver -> 1 delivers | 1 shows | 1 gives us
Negation -> 4 not | 3 never | 1 hardly | 1 anything but
Intensifier -> 1 very | 1 really | 1 truly | 1 deeply | 1 quite | 1 simply | 1 utterly
Hurdle -> 1 the budget | 1 its length | 1 the genre | 1 everything
Tail -> 3 | 2 about Topic | 1 from a Trade Person
Opening -> 1 in the end | 1 this time | 1 from start to finish | 1 scene by scene | 1 once again
Kind -> 1 comedy | 1 thriller | 1 drama | 1 western | 1 romance | 1 mystery
Trade -> 1 young | 1 local | 1 veteran | 1 first-time | 1 french
Be -> 4 is | 1 feels | 1 remains
Film -> 4 film | 3 movie | 1 picture | 1 story | 1 sequel | 1 remake
Aspect -> 1 plot | 1 acting | 1 script | 1 pace | 1 dialogue | 1 music | 1 camera work | 1 ending | 1 cast | 1 humor | 1 editing | 1 premise
Person -> 1 director | 1 writer | 1 actress | 1 actor | 1 star | 1 composer
Audience -> 1 the viewer | 1 the audience | 1 its fans | 1 the critics | 1 children | 1 everyone
Topic -> 1 love | 1 family | 1 war | 1 friendship | 1 crime | 1 growing up | 1 old age | 1 music
Adj+ -> 1 funny | 1 touching | 1 brilliant | 1 superb | 1 charming | 1 witty | 1 delightful | 1 beautiful | 1 gripping | 1 moving | 1 clever | 1 tender | 1 fresh | 1 powerful | 1 wonderful | 1 thrilling | 1 heartfelt | 1 smart | 1 lively | 1 rewarding
Adj- -> 1 dull | 1 boring | 1 tedious | 1 bland | 1 clumsy | 1 predictable | 1 lifeless | 1 stupid | 1 shallow | 1 messy | 1 painful | 1 stale | 1 weak | 1 tiresome | 1 pointless | 1 terrible | 1 pretentious | 1 lazy | 1 dreary | 1 forgettable
Excess -> 1 long | 1 slow | 1 loud | 1 silly | 1 safe
Verb+ -> 1 delights | 1 charms | 1 moves | 1 thrills | 1 rewards | 1 wins over
Verb- -> 1 bores | 1 annoys | 1 insults | 1 confuses | 1 tires | 1 lets down
Quality+ -> 1 wit | 1 charm | 1 warmth | 1 style | 1 real laughs | 1 heart | 1 suspense | 1 grace
Quality- -> 1 cliches | 1 bad jokes | 1 noise | 1 plot holes | 1 bad taste | 1 self-pity | 1 empty talk | 1 cheap tricks
"""

# What the small GPT-2 is "pre-trained" on besides: plain sentences with no opinion.
CHATTER_GRAMMAR = """
Chatter -> 3 the Someone Went to the Place Moment . | 2 Number Crowd Live near the Place . | 2 the Film Opens Moment in the Place . | 1 a Someone asks about the Film .
Someone -> 1 director | 1 writer | 1 actor | 1 teacher | 1 doctor | 1 farmer | 1 sailor | 1 soldier | 1 singer
Crowd -> 1 friends | 1 students | 1 tourists | 1 neighbours | 1 brothers
Went -> 1 goes | 1 travels | 1 returns | 1 walks
Place -> 1 city | 1 harbour | 1 village | 1 cinema | 1 market | 1 station | 1 school | 1 island
Moment -> 1 in the morning | 1 at night | 1 in winter | 1 once again | 1 this time
Number -> 1 two | 1 three | 1 four
Live -> 1 live | 1 work | 1 meet
Opens -> 1 opens | 1 plays | 1 is shown
Film -> 1 film | 1 movie | 1 story | 1 comedy | 1 drama
"""


class Grammar:
    """A probabilistic context-free grammar without recursion, read from its text."""

    def __init__(self, text: str):
        self.rules = {}  # symbol -> [(probability, expansion)]
        for line in text.strip().splitlines():
            for signs in ("++-", "--+"):  # a rule without them is read twice
                signed = line.translate(str.maketrans("*=~", signs))
                symbol, _, right = signed.partition(" -> ")
                options = [option.split() for option in right.split("|")]
                total = sum(float(weight) for weight, *_ in options)
                self.rules[symbol] = [(float(w) / total, x) for w, *x in options]

    def sample(self, symbol: str, rng: random.Random) -> list[str]:
        """The words of one random expansion of the symbol."""
        if symbol not in self.rules:
            return [symbol]
        weights = [p for p, _ in self.rules[symbol]]
        _, expansion = rng.choices(self.rules[symbol], weights)[0]
        return [word for part in expansion for word in self.sample(part, rng)]

    def probability(self, parts: list[str], words: list[str], begins=False) -> float:
        """The probability that the parts expand to these words, or begin with them."""
        if not parts or (begins and not words):
            return float(not words)
        first, *others = parts
        if first in self.rules:
            options = self.rules[first]
            return sum(
                p * self.probability(x + others, words, begins) for p, x in options
            )
        fits = words[:1] == [first]
        return self.probability(others, words[1:], begins) if fits else 0.0


REVIEWS, CHATTER = Grammar(REVIEW_GRAMMAR), Grammar(CHATTER_GRAMMAR)


class Verdict(NamedTuple):
    """The exact truth about a text."""

    probability: float
    grammatical: bool
    positive: bool


@functools.cache
def judge(text: str, begins=False) -> Verdict:
    """What the grammar of the reviews says of a text, or of all that begin with it."""
    symbols, words = (["Review+"], ["Review-"]), text.split(" ")
    good, bad = (REVIEWS.probability(x, words, begins) / 2 for x in symbols)
    return Verdict(good + bad, good + bad > 0, good > bad)


MADE_FROM = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # as imported
# Where the tiny preset looks for it.
WORLD = Path("runs/tiny/world")
# What is built; a change here, in the grammars or in this file's code rebuilds it.
ROWS = {"train": 24_000, "validation": 800, "test": 400}
VOCABULARY = 1200  # tokens
MODEL = {"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": 128}
PRETRAINING = {"steps": 800, "batch": (32, 64), "lr": 2e-3}
SEED = 1


def write_review(rng: random.Random) -> tuple[str, int]:
    """One random review and its label."""
    label = rng.randrange(2)
    return " ".join(REVIEWS.sample(f"Review{'-+'[label]}", rng)), label


def make_dataset(seed: int = 0) -> datasets.DatasetDict:
    """Reviews in the columns, and with the quirks, of SST-2 on the hub.

    Train and validation sentences end in a space; the test labels are -1.
    """
    features = datasets.Features(
        idx=datasets.Value("int32"),
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["negative", "positive"]),
    )
    rng, rows = random.Random(seed), {split: [] for split in ROWS}
    while any(len(rows[split]) < n for split, n in ROWS.items()):
        text, label = write_review(rng)
        # The split goes by the text's hash, so that no text stands in two
        share = hashlib.sha256(text.encode()).digest()[0] / 256
        split = "train" if share < 0.8 else "validation" if share < 0.9 else "test"
        if (idx := len(rows[split])) < ROWS[split]:
            quirky = (text, -1) if split == "test" else (f"{text} ", label)
            rows[split].append(dict(zip(features, (idx, *quirky), strict=True)))
    make = functools.partial(datasets.Dataset.from_list, features=features)
    return datasets.DatasetDict({split: make(some) for split, some in rows.items()})


def write_document(rng: random.Random) -> str:
    """A few unlabelled sentences in a row, as a model meets them in pre-training."""

    def sentence():
        if rng.random() < 0.5:
            return " ".join(CHATTER.sample("Chatter", rng))
        return write_review(rng)[0]

    return " ".join(sentence() for _ in range(rng.randint(3, 6)))


def train_tokenizer(documents: list[str]) -> GPT2TokenizerFast:
    """A byte-level BPE with GPT-2's one special token."""
    eos = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), eos)
    return GPT2TokenizerFast(tokenizer_object=bpe, **names)


def pretrain(tokenizer, show_progress=True, seed: int = SEED) -> GPT2LMHeadModel:
    """A small GPT-2 trained to predict the next token of random documents."""
    rng, eos, stream = random.Random(seed), tokenizer.eos_token_id, []
    torch.manual_seed(seed)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": eos, "eos_token_id": eos}
    model = GPT2LMHeadModel(GPT2Config(**ids, **MODEL))
    steps, lr, shape = (PRETRAINING[name] for name in ("steps", "lr", "batch"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    bar = {"desc": "Pre-train the tiny GPT-2", "disable": not show_progress}
    for _ in tqdm(range(steps), **bar, file=sys.stdout):
        while len(stream) < math.prod(shape):
            documents = [write_document(rng) for _ in range(200)]
            for ids in tokenizer(documents)["input_ids"]:
                stream += [*ids, eos]
        ids = torch.tensor(stream[: math.prod(shape)]).view(shape)
        del stream[: math.prod(shape)]
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def build_world(folder=WORLD, show_progress: bool = True) -> Path:
    """Write `dataset` and `model` under the folder, unless they are there already.

    An interrupted build leaves nothing that looks finished. Of two processes at once,
    say a notebook and a command, the second waits for the first.
    """
    folder = Path(folder)

    def is_built():
        file = folder / "definition.txt"
        return file.exists() and file.read_text() == MADE_FROM

    if is_built():
        return folder
    if show_progress:
        print("the tiny world is built, once; that takes a minute or two")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The empty file stays: to remove it would let a third process past a second
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if is_built():  # by another process
            return folder
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        # Not as Parquet files, which the library does not find in a folder with [ ]
        make_dataset().save_to_disk(unfinished / "dataset")
        rng = random.Random(0)
        tokenizer = train_tokenizer([write_document(rng) for _ in range(3000)])
        tokenizer.save_pretrained(unfinished / "model")
        pretrain(tokenizer, show_progress).save_pretrained(unfinished / "model")
        (unfinished / "definition.txt").write_text(MADE_FROM)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder


def world_of(name: str) -> Path | None:
    """The folder of the tiny world that holds a model or data set, if one does."""
    folder = Path(name).parent
    return folder if folder.parts[-2:] == WORLD.parts[-2:] else None


def prepare(settings):
    """Build the tiny world if the settings use it (a minute or two, once)."""
    for name in (settings.model_name, settings.dataset_name):
        if folder := world_of(name):
            build_world(folder)


def least_loss(settings, rows: list[list[int]], tokenizer) -> dict:
    """What a model that knew the grammar would lose on these reviews; {} on real data.

    Nats per token, the first token of each review given, the closing EOS included.
    Nothing either if the tokenizer is not the tiny world's, or if a review was cut.
    """
    if not world_of(settings.dataset_name) or not world_of(settings.model_name):
        return {}
    texts = [tokenizer.decode(row[:-1]) for row in rows]
    exact = [judge(text) for text in texts]
    if not all(verdict.grammatical for verdict in exact):
        return {}
    begun = [judge(text.split()[0], begins=True) for text in texts]
    chances = zip(begun, exact, strict=True)
    nats = sum(math.log(x.probability / y.probability) for x, y in chances)
    return {"the grammar": nats / sum(len(row) - 1 for row in rows)}


def exact_judges(settings) -> dict:
    """Judges that know the truth, by the name of their figure; none for real data."""
    if not world_of(settings.dataset_name):
        return {}
    return {
        "exactly_positive": lambda texts: [judge(x).positive for x in texts],
        "exactly_grammatical": lambda texts: [judge(x).grammatical for x in texts],
    }
