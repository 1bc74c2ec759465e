"""Paired figures before and after: the same prompts, the same seed, two models."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.data import tokenize
from utils.ppo import check_shapes
from utils.rollout import has_ended, response_tokens, squash

# The figures of the three notebooks by name: what each is, and how it is printed
FIGURES = {
    "validation_loss": ("SFT: validation loss [nats per token]", ".3f"),
    "validation_perplexity": ("SFT: validation perplexity", ".2f"),
    "accuracy": ("reward model: validation accuracy", ".1%"),
    "reward": ("mean reward, 2 sigmoid(raw logit) - 1", ".2f"),
    "judged_positive": ("positive, says the independent judge", ".1%"),
    "exactly_positive": ("grammatical and positive, exactly", ".1%"),
    "exactly_grammatical": ("grammatical, exactly", ".1%"),
    "kl": ("KL to the reference [nats per response]", ".2f"),
    "score": ("mean score, normalised", "z.2f"),
    "objective": ("J = mean score - beta * KL", "z.2f"),
    "share": ("share of the best possible gain in J", ".1%"),
    "perplexity": ("perplexity under the SFT model", ".2f"),
    "distinct_1": ("distinct-1, share of different tokens", ".3f"),
    "distinct_2": ("distinct-2, share of different pairs", ".3f"),
    "eos_rate": ("responses that end in EOS", ".1%"),
    "length": ("mean length of a response [tokens]", ".1f"),
}


def train_judge(sentences, labels, tokenizer, seed: int, epochs: int = 3):
    """A sentiment classifier that shares no weight with the reward model.

    It is the mean of an embedding per token, and a linear layer. Returns a function
    from a list of texts to a list of bools, True for positive.
    """
    torch.manual_seed(seed)
    bag, linear = nn.EmbeddingBag(len(tokenizer), 32), nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*bag.parameters(), *linear.parameters()], lr=5e-3)
    targets = torch.tensor(labels, dtype=torch.float32)

    def logits(rows):
        starts = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
        tokens = torch.tensor([token for row in rows for token in row])
        return linear(bag(tokens, starts)).squeeze(-1)

    def encode(texts):
        # A policy may spell the letters of EOS, which `tokenize` refuses
        texts = [text.replace(tokenizer.eos_token, "") for text in texts]
        return tokenize(texts, tokenizer, max_tokens=1000)

    rows = encode(sentences)
    for _ in tqdm(range(epochs), desc="Train the judge", file=sys.stdout):
        for index in torch.randperm(len(rows)).split(256):
            optimizer.zero_grad()
            guess = logits([rows[i] for i in index])
            F.binary_cross_entropy_with_logits(guess, targets[index]).backward()
            optimizer.step()

    def judge(texts):
        with torch.no_grad():
            return (logits(encode(texts)) > 0).tolist()

    return judge


def distinct_n(rows: list[list[int]], n: int) -> float:
    """Different n-grams as a share of all (Li et al. 2016, arXiv 1510.03055)."""
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def measure_rollouts(
    rollouts: list, tokenizer, judges: dict
) -> tuple[dict, list[dict]]:
    """The figures of some rollouts, and a row for each response.

    `judges` maps the name of a figure to a function from texts to bools. Returns
    figures by the names of FIGURES, and for each response a row with `prompt`,
    `response`, `raw` (the reward model's logit), `reward` (2 sigmoid(raw) - 1), `ended`
    (with EOS), `kl` (summed k1, nats), `score` (normalised), `ref` (its log-probability
    under the reference, nats), `tokens` (of the response) and `text`.
    """
    rows, eos_id = [], tokenizer.eos_token_id
    for rollout in rollouts:
        columns = {
            "raw": rollout.raw_scores,
            "reward": squash(rollout.raw_scores),
            "score": rollout.scores,
            "ended": has_ended(rollout.input_ids, rollout.mask, eos_id).float(),
            "kl": (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1),
            "ref": rollout.ref_logprobs.sum(dim=1),
        }
        columns = {name: column.tolist() for name, column in columns.items()}
        responses = response_tokens(rollout.input_ids, rollout.mask)
        for i, tokens in enumerate(responses):
            text = rollout.input_ids[i][rollout.attention_mask[i].bool()].tolist()
            parts = {"prompt": text[: -len(tokens)], "response": tokens, "text": text}
            row = {
                name: tokenizer.decode(part, skip_special_tokens=True)
                for name, part in parts.items()
            }
            row |= {name: column[i] for name, column in columns.items()}
            rows.append({**row, "tokens": tokens})
    tokens, texts = [row["tokens"] for row in rows], [row["text"] for row in rows]
    n_tokens, ref = sum(map(len, tokens)), sum(row["ref"] for row in rows)
    figures = {name: sum(judge(texts)) / len(texts) for name, judge in judges.items()}
    for name in ("reward", "kl", "score", "ended"):
        figures[name] = sum(row[name] for row in rows) / len(rows)
    figures |= {"eos_rate": figures.pop("ended"), "length": n_tokens / len(rows)}
    figures["perplexity"] = math.exp(-ref / n_tokens)
    figures |= {f"distinct_{n}": distinct_n(tokens, n) for n in (1, 2)}
    return figures, rows


def best_possible(
    scores: Tensor, log_ratios: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """What the best policy of all reaches with each prompt, and the weights it gives.

    No policy has a higher J = E[R] - beta KL than pi* = pi_ref e^(R / beta) / Z, and
    its J* is beta log Z, with Z = E_ref[e^(R / beta)]. Half of the K responses to each
    prompt are the reference's and half some policy's, so that Z is a mean over what
    either writes, each with its weight under the mixture:

    w = pi_ref / (pi_ref / 2 + pi / 2) e^(R / beta),   J* = beta log mean w

    Scores and log_ratios (log pi - log pi_ref of the response, nats) are (P, K). It
    gives J* (P,), in units of the score, and weights (P, K) that add up to 1 for each
    prompt; 1 / (sum of their squares) is the effective number of responses. Rafailov et
    al. 2023 (arXiv 2305.18290), equation 4, for pi*; Veach & Guibas 1995, "Optimally
    Combining Sampling Techniques", equation 9, for the mixture (by Owen & Zhou 2000
    called deterministic). Raises ValueError if the shapes disagree.
    """
    check_shapes(scores=scores, log_ratios=log_ratios)
    # The factor before e^(R / beta) is 2 / (1 + pi / pi_ref); here its logarithm
    logs = scores / kl_coef + math.log(2) - F.softplus(log_ratios)
    best = kl_coef * (logs.logsumexp(dim=1) - math.log(logs.shape[1]))
    return best, logs.softmax(dim=1)


def expected(settings) -> dict[str, list[float]]:
    """Mean and standard deviation of each figure after training, over ten seeds.

    They hold for the tiny preset on a CPU; `python -m workshop.measure expected` finds
    them anew. With other settings, or where there is a GPU, nothing is known.
    """
    other = settings.changes.keys() - {"seed", "runs_dir", "train_anyway"}
    if other or settings.preset != "tiny" or torch.cuda.is_available():
        return {}
    return json.loads(Path(__file__).with_name("expected.json").read_text())["figures"]


def figures_table(before: dict, after: dict, expected: dict | None = None) -> str:
    """The figures that were measured as lines of text: name, before, after.

    `expected` holds the mean and standard deviation of figures over several seeds; it
    adds a column with mean ± 4 sd (half a point at least, for a share), and marks what
    lies outside.
    """
    head = "expected (mean ± 4 sd)" if expected else ""
    lines = [f"{'':42}{'before':>10}{'after':>10}   {head}".rstrip()]
    for name, (description, spec) in FIGURES.items():
        if name not in before | after:
            continue
        old, new = (format(x[name], spec) if name in x else "" for x in (before, after))
        line = f"{description:42}{old:>10}{new:>10}".rstrip()
        if name in after and name in (expected or {}):
            mean, sd = expected[name]
            # A share of a few hundred texts may differ by one of them
            width = max(4 * sd, 0.005 if spec.endswith("%") else 0.0)
            line += f"   {mean:{spec}} ± {width:{spec}}"
            line += "   outside" if abs(after[name] - mean) > width else ""
        lines.append(line)
    return "\n".join(lines)
