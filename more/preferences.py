"""The mathematics of preferences: Bradley–Terry and DPO; and the file of pairs.

A pair is two responses to one prompt, of which somebody preferred one: *chosen* and
*rejected*. Scores and log-probabilities are (B,), a number for each whole response: of
log-probabilities the sum over its tokens, EOS included and prompt excluded.

Sources: Bradley & Terry 1952, "Rank Analysis of Incomplete Block Designs"; Ouyang et
al. 2022 (arXiv 2203.02155) for the reward model; Rafailov et al. 2023 (arXiv
2305.18290) for DPO; Azar et al. 2023 (arXiv 2310.12036) for IPO.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from more.common import write_text
from utils.data import encode
from utils.ppo import check_shapes

FIELDS = ("prompt", "chosen", "rejected")


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of -log sigmoid(R_chosen - R_rejected): (B,), (B,) -> scalar loss, stats.

    The model behind it: somebody prefers c to r with probability sigmoid(R_c - R_r).
    Only differences count, so scores are determined up to a constant. Stats:
    `accuracy`, the share of pairs whose chosen one has the higher score (a tie is no
    win), and `margin`, the mean difference. arXiv 2203.02155, equation 1. Raises
    ValueError if the shapes disagree.
    """
    check_shapes(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    gap = chosen_scores - rejected_scores
    stats = {"accuracy": (gap > 0).to(gap.dtype).mean(), "margin": gap.detach().mean()}
    return -F.logsigmoid(gap).mean(), stats


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of direct preference optimisation: all (B,) -> scalar loss, stats.

    With the difference of the log-ratios D = (log pi - log pi_ref)(chosen) - (log pi -
    log pi_ref)(rejected), the mean over the pairs of

        sigmoid: -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D)
        ipo:     (D - 1 / (2 beta))^2

    beta (log pi - log pi_ref) is the *implicit reward*: on endless pairs of
    Bradley–Terry type the minimum is the policy in proportion to pi_ref exp(R / beta),
    which PPO is after, too. `label_smoothing` eps is the share of pairs taken to be the
    wrong way round. No gradient reaches the reference. Stats, of the implicit rewards:
    `chosen_reward`, `rejected_reward`, `accuracy` and `margin` as in
    `bradley_terry_loss`.

    arXiv 2305.18290, equation 7; with smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences"; IPO: arXiv 2310.12036, equation 17. Raises ValueError if the
    shapes disagree, beta is not positive, eps is not from 0 to below a half, eps is
    given for ipo, or for another kind.
    """
    check_shapes(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if kind not in ("sigmoid", "ipo"):
        raise ValueError(f"kind must be sigmoid or ipo, got {kind!r}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind == "ipo"):
        raise ValueError(
            "label_smoothing must be from 0 to below 0.5, and 0 for ipo, got "
            f"{label_smoothing}"
        )
    chosen = chosen_logprobs - ref_chosen_logprobs.detach()
    rejected = rejected_logprobs - ref_rejected_logprobs.detach()
    difference = chosen - rejected
    # Bradley-Terry, with implicit rewards for scores: only their difference counts
    scores = beta * difference, torch.zeros_like(difference)
    loss, wins = bradley_terry_loss(*scores)
    if kind == "ipo":
        loss = ((difference - 1 / (2 * beta)) ** 2).mean()
    elif label_smoothing:
        turned, _ = bradley_terry_loss(*reversed(scores))
        loss = (1 - label_smoothing) * loss + label_smoothing * turned
    stats = {"chosen_reward": chosen, "rejected_reward": rejected}
    return loss, {k: beta * x.detach().mean() for k, x in stats.items()} | wins


def check_pair(pair):
    """Raise ValueError, saying what is wrong, unless it has two texts to a prompt."""
    if not isinstance(pair, dict):
        raise ValueError("this is no object with prompt, chosen and rejected")
    for name in FIELDS:
        if not isinstance(pair.get(name), str) or not pair[name].strip():
            raise ValueError(f"there is no text {name!r}")
        pair[name].encode()  # an error for half a letter, which json lets through
    if pair["chosen"] == pair["rejected"]:
        raise ValueError("chosen and rejected are the same text")


def _line(pair: dict[str, str]) -> bytes:
    """A pair as a line of its file."""
    line = json.dumps({name: pair[name] for name in FIELDS}, ensure_ascii=False)
    return line.encode() + b"\n"


def append_pair(path, pair: dict[str, str]):
    """Add a pair to a file of JSON Lines, so that it is on disk when this returns.

    All other lines stay as they are. Raises ValueError as `check_pair` does.
    """
    check_pair(pair)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    ended = not content or content.endswith((b"\n", b"\r"))
    write_text(path, content + (b"" if ended else b"\n") + _line(pair))


def remove_pair(path, pair: dict[str, str]):
    """Take the last line with this pair out of a file; all others stay as they are.

    Raises ValueError if there is none.
    """
    before, line, after = Path(path).read_bytes().rpartition(_line(pair))
    if not line:
        raise ValueError(f"{path} does not hold this answer any more: {pair}")
    write_text(path, before + after)


def read_pairs(
    *paths, check: Callable[[dict], object] = lambda pair: None
) -> tuple[list[dict[str, str]], list[str]]:
    """The pairs of files of JSON Lines, and what is wrong with their other lines.

    Each line is an object with `prompt`, `chosen` and `rejected`; prompt and response
    one after the other are the text. What is wrong is a sentence that begins with the
    file and the number of the line; `check` may find more, and raises ValueError. Of
    two lines with the same texts that say the opposite, the first counts. Raises
    FileNotFoundError if a file is not there.
    """
    pairs, faults, seen = [], [], {}
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"no file {path} of pairs yet; label some first")
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            place = f"{path}, line {number}"
            try:
                check_pair(pair := json.loads(line))
                check(pair)
                key = pair["prompt"], frozenset((pair["chosen"], pair["rejected"]))
                chosen, first = seen.setdefault(key, (pair["chosen"], place))
                if chosen != pair["chosen"]:
                    raise ValueError(f"it prefers the text that {first} rejects")
                pairs.append(pair)
            except ValueError as error:  # of JSON or UTF-8, too
                faults.append(f"{place}: {error}")
    return pairs, faults


def pair_tokens(
    pair: dict[str, str], tokenizer, max_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a pair's prompt, and of both responses with EOS behind them.

    Each text is tokenised as a whole, as a model would read it. Raises ValueError if it
    then does not begin with the prompt's own tokens: the policy would be asked for
    another text than the one that was judged. Also if a response holds EOS, or if a
    text has more than max_tokens.
    """
    wholes = [pair["prompt"] + pair[name] for name in FIELDS[1:]]
    prompt, *texts = encode([pair["prompt"], *wholes], tokenizer)
    responses = []
    for name, text in zip(FIELDS[1:], texts, strict=True):
        response = text[len(prompt) :]
        if text[: len(prompt)] != prompt or not response:
            raise ValueError(
                f"a token of prompt + {name} begins in the one and ends in the other: "
                f"{pair['prompt'][-20:]!r} and {pair[name][:20]!r}"
            )
        if tokenizer.eos_token_id in response:
            raise ValueError(f"{name} holds the EOS token {tokenizer.eos_token!r}")
        if len(text) >= max_tokens:
            raise ValueError(
                f"prompt + {name} have {len(text) + 1} tokens, more than {max_tokens}"
            )
        responses.append([*response, tokenizer.eos_token_id])
    return prompt, *responses
