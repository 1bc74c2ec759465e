"""Paired figures before and after: the same prompts, the same seed, two models."""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.data import tokenize
from utils.rollout import Rollout, has_ended, squash

# The figures of notebook 3 by name: what each is, and how it is printed.
FIGURES = {
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
    """A sentiment classifier that shares nothing with the reward model.

    The mean of an embedding per token, and a linear layer. Returns a function from a
    list of texts to a list of bools, True for positive.
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
        # What a policy writes may spell EOS in other tokens
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
    rollouts: list[Rollout], tokenizer, judges: dict
) -> tuple[dict, list[dict]]:
    """The figures of some rollouts, and a row for each response.

    `judges` maps the name of a figure to a function from texts to bools. Returns
    figures by the names of FIGURES, and for each response a row with `prompt`,
    `response`, `raw` (the reward model's logit), `reward` (2 sigmoid(raw) - 1), `ended`
    (with EOS), `kl` (summed k1, nats), `score` (normalised) and `text`.
    """
    rows, responses, ref_logprob = [], [], 0.0
    for rollout in rollouts:
        columns = {
            "raw": rollout.raw_scores,
            "reward": squash(rollout.raw_scores),
            "score": rollout.scores,
            "ended": has_ended(rollout.input_ids, rollout.mask, tokenizer.eos_token_id),
            "kl": (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1),
        }
        columns = {name: column.tolist() for name, column in columns.items()}
        ref_logprob += rollout.ref_logprobs.sum().item()
        for i, n in enumerate(rollout.cpu_mask.sum(dim=1).tolist()):
            text = rollout.input_ids[i][rollout.attention_mask[i].bool()].tolist()
            prompt, response = text[:-n], text[-n:]
            responses.append(response)
            texts = {
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "response": tokenizer.decode(response, skip_special_tokens=True),
                "text": tokenizer.decode(text, skip_special_tokens=True),
            }
            rows.append({**texts, **{name: x[i] for name, x in columns.items()}})
    n_tokens = sum(map(len, responses))
    texts = [row["text"] for row in rows]
    figures = {
        "reward": sum(row["reward"] for row in rows) / len(rows),
        **{name: sum(judge(texts)) / len(texts) for name, judge in judges.items()},
        **{
            name: sum(row[name] for row in rows) / len(rows) for name in ("kl", "score")
        },
        "perplexity": math.exp(-ref_logprob / n_tokens),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "eos_rate": sum(row["ended"] for row in rows) / len(rows),
        "length": n_tokens / len(rows),
    }
    return figures, rows


def best_possible(scores: Tensor, kl_coef: float) -> tuple[Tensor, dict]:
    """The best policy at a price of KL, estimated from the reference's responses.

    `scores` (P, K): those of K responses of the reference to each of P prompts. The
    best policy is in proportion to pi_ref * exp(R / beta), so the i-th response gets
    w_i = softmax(R / beta)_i of it, and 1 / K of the reference (Rafailov et al. 2023,
    arXiv 2305.18290, equation 4; importance sampling, normalised by itself). Returns
    the weights w (P, K), and means over the prompts:

        score = sum_i w_i R_i        kl = sum_i w_i log(K w_i)  [nats per response]
        objective = score - beta kl = beta log mean_i exp(R_i / beta)

    K responses show no KL above log K; where the estimate comes near that, take more.
    Raises ValueError if beta is not above 0 or a prompt has fewer than two responses.
    """
    if kl_coef <= 0:
        raise ValueError(
            f"kl_coef must be above 0, got {kl_coef}; without a price take best-of-n"
        )
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores must be (prompts, responses), two responses at least, got "
            f"{tuple(scores.shape)}"
        )
    logs = (scores.double() / kl_coef).log_softmax(dim=1)
    weights = logs.exp()
    score = (weights * scores).sum(dim=1).mean().item()
    kl = (weights * (logs + math.log(scores.shape[1]))).sum(dim=1).mean().item()
    return weights, {"score": score, "kl": kl, "objective": score - kl_coef * kl}


def best_of_n(logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """Log-probabilities (..., K) of K responses after best-of-n.

    Of n responses drawn from a policy, that with the highest score is kept; among
    equal scores chance decides. With F(s) the policy's chance of a score of at most s,
    F(s-) of one below s, and p(s) = F(s) - F(s-),

        pi_n(y) = pi(y) / p(R(y)) * (F(R(y))^n - F(R(y)-)^n)

    (Beirami et al. 2024, arXiv 2401.01879, where no two scores are equal). `logprobs`
    (..., K) and `scores` are those of all responses; or of a sample, each with -log K.
    Raises ValueError if n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; 1 is the policy itself")
    mine, others = scores.unsqueeze(-1), scores.unsqueeze(-2)
    each = logprobs.double().unsqueeze(-2)

    def log_chance(which):
        return each.masked_fill(~which, -math.inf).logsumexp(dim=-1)

    up_to, below = log_chance(others <= mine), log_chance(others < mine)
    # log(F^n - F-^n), where the powers alone might be too small for a float
    kept = n * up_to + (-torch.expm1(n * (below - up_to))).log()
    return logprobs + kept - log_chance(others == mine)


# 97.5 % of Student's t with n - 1 degrees of freedom lie below it, by n
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
T_975 |= {9: 2.306, 10: 2.262}


def interval_95(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over runs (n, ...), and half the width of its 95 % interval.

    t s / sqrt(n), with the deviation s of the sample and t of Student's distribution
    (Student 1908, "The Probable Error of a Mean"). Raises ValueError for fewer than 2
    or more than 10 runs.
    """
    if (n := len(runs)) not in T_975:
        raise ValueError(f"an interval takes 2 to 10 runs, got {n}")
    return runs.mean(dim=0), T_975[n] * runs.std(dim=0) / n**0.5


def gain_in_objective(
    score: float, kl: float, reference_scores: Tensor, kl_coef: float
) -> dict[str, float]:
    """J of a policy, and how far it is from the reference's to the best possible.

    `score` and `kl` (nats) are means over its responses, `reference_scores` (P, K) the
    scores of K responses of the reference to each prompt. Returns

        objective: J = score - beta kl
        share: (J - J_ref) / (J* - J_ref)

    where J_ref is the mean of `reference_scores`, and J* is that of `best_possible`.
    Without a price nothing is the best possible, so there is no share.
    """
    objective = score - kl_coef * kl
    if not kl_coef:
        return {"objective": objective}
    start = reference_scores.mean().item()
    most = best_possible(reference_scores, kl_coef)[1]["objective"]
    return {"objective": objective, "share": (objective - start) / (most - start)}


def figures_table(
    before: dict, after: dict, expected: dict | None = None, figures: dict = FIGURES
) -> str:
    """The figures that were measured as lines of text: name, before, after.

    `expected` holds the mean and standard deviation of figures over several seeds; it
    adds a column with mean ± 4 sd (half a point at least, for a share), and marks what
    lies outside.
    """
    head = "expected (mean ± 4 sd)" if expected else ""
    lines = [f"{'':42}{'before':>10}{'after':>10}   {head}".rstrip()]
    for name, (description, spec) in figures.items():
        if name not in after:
            continue
        old = format(before[name], spec) if name in before else ""
        line = f"{description:42}{old:>10}{format(after[name], spec):>10}"
        if expected and name in expected:
            mean, sd = expected[name]
            # One text more or less, of a few hundred, is no news
            width = max(4 * sd, 0.005 if spec.endswith("%") else 0.0)
            line += f"   {mean:{spec}} ± {width:{spec}}"
            if abs(after[name] - mean) > width:
                line += "   outside"
        lines.append(line)
    return "\n".join(lines)
