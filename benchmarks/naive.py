"""The loops as one would write them first: right, and without a thought for speed.

One prompt at a time is continued, every place of every text is projected to the whole
vocabulary (by the reward model too), batches are made in random order.
"""

import random
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from more.common import peak_memory
from utils.data import lm_labels, pad
from utils.models import (
    PolicyWithValueHead,
    RewardHead,
    hidden_states,
    load_causal_lm,
    vocabulary_logits,
)
from utils.ppo import (
    compute_gae,
    masked_whiten,
    policy_loss,
    token_logprobs,
    token_rewards,
    value_loss,
)


@torch.no_grad()
def generate(lm, prompt, work, generator):
    """The continuation of one prompt, token by token, with its KV cache."""
    text, cache = list(prompt), DynamicCache(config=lm.config)
    ids = torch.tensor([text], device=work.device)
    for _ in range(work.settings.max_new_tokens):
        mask = torch.ones(1, len(text), dtype=torch.long, device=work.device)
        logits = vocabulary_logits(lm, hidden_states(lm.base_model, ids, mask, cache))
        probs = (logits[0, -1] / work.settings.temperature).softmax(-1)
        ids = torch.multinomial(probs, 1, generator=generator).view(1, 1)
        text.append(ids.item())
        if text[-1] == work.stop_id:
            break
    return text


def forward(policy, ids, mask, temperature):
    """Log-probability of each next token, and the value before it: (B, L - 1)."""
    output = policy.lm(ids, attention_mask=mask, output_hidden_states=True)
    logprobs = token_logprobs(output.logits[:, :-1], ids[:, 1:], temperature)
    return logprobs, policy.value_head(output.hidden_states[-1][:, :-1])


def last_state(lm, ids, mask):
    """The hidden state of each text's last token, from a whole language model."""
    states = lm(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    return states[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]


def ppo(work, watch):
    """The same PPO on the same work."""
    settings, device, tau = work.settings, work.device, work.settings.temperature
    policy = PolicyWithValueHead(load_causal_lm(work.model, device)).to(device).eval()
    reference = PolicyWithValueHead(work.reference)
    reward_lm = AutoModelForCausalLM.from_pretrained(work.model).to(device)
    groups = [
        {"params": policy.lm.parameters(), "lr": settings.ppo_lr},
        {"params": policy.value_head.parameters(), "lr": settings.value_head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(work.seed)
    for step in range(settings.ppo_steps):
        prompts = work.prompts_of(step)
        watch.switch("generate")
        texts = [generate(policy.lm, prompt, work, generator) for prompt in prompts]
        ids, attention_mask = (x.to(device) for x in pad(texts, work.stop_id))
        lengths = attention_mask.sum(dim=1)
        starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(ids.shape[1] - 1, device=device)
        # of the next tokens: those of the response
        mask = (places >= starts[:, None] - 1) & (places < lengths[:, None] - 1)
        size = settings.ppo_minibatch_size
        pieces = list(zip(ids.split(size), attention_mask.split(size), strict=True))
        with torch.no_grad():
            watch.switch("score")
            raw = [work.reward.head(last_state(reward_lm, *piece)) for piece in pieces]
            scores = work.normalised(torch.cat(raw))
            watch.switch("log-probs")
            found = [
                (*forward(policy, *piece, tau), forward(reference, *piece, tau)[0])
                for piece in pieces
            ]
            old, old_values, ref = map(torch.cat, zip(*found, strict=True))
            rewards = token_rewards(scores, old, ref, mask, settings.kl_coef)
            advantages, returns = compute_gae(
                rewards, old_values, mask, lam=settings.gae_lambda
            )
            advantages = masked_whiten(advantages, mask)
        watch.switch("update")
        for _ in range(settings.ppo_epochs):
            order = torch.randperm(len(ids), generator=generator, device=device)
            for i in order.split(size):
                logprobs, values = forward(policy, ids[i], attention_mask[i], tau)
                given = (old[i], advantages[i], mask[i], settings.clip_range)
                pi_loss, _ = policy_loss(logprobs, *given)
                given = (old_values[i], returns[i], mask[i], settings.value_clip_range)
                v_loss, _ = value_loss(values, *given)
                (pi_loss + settings.value_coef * v_loss).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        watch.rollout_done()


def train(work, model, rows, loss_of, lr):
    """One epoch over the rows in random order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rows, size = random.Random(work.seed).sample(rows, len(rows)), 32
    started = time.perf_counter()
    for i in range(0, len(rows), size):
        ids, mask = pad([row for row, _ in rows[i : i + size]], 0)
        labels = torch.tensor([float(y) for _, y in rows[i : i + size]])
        loss_of(*(x.to(work.device) for x in (ids, mask, labels))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": peak_memory(work.device)}


def sft(work, rows):
    """Fine-tuning with the model's own loss."""
    model = load_causal_lm(work.model, work.device).train()

    def loss_of(ids, mask, _):
        return model(ids, attention_mask=mask, labels=lm_labels(ids, mask)).loss

    return train(work, model, rows, loss_of, work.settings.sft_lr)


def rm(work, rows):
    """A head on a whole language model."""
    lm = load_causal_lm(work.model, work.device).train()
    head = RewardHead(lm.config.hidden_size).to(work.device)

    def loss_of(ids, mask, labels):
        raw = head(last_state(lm, ids, mask))
        return F.binary_cross_entropy_with_logits(raw, labels)

    model = torch.nn.ModuleList([lm, head])
    return train(work, model, rows, loss_of, work.settings.rm_lr)
