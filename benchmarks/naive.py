"""The loops as one would write them first: right, and without a thought for speed.

One prompt at a time is continued, every place of every text is projected to the whole
vocabulary (by the reward model too), batches are made in random order.
"""

import random
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.work import peak_memory
from utils.data import lm_labels, pad
from utils.models import (
    PolicyWithValueHead,
    RewardHead,
    cache_argument,
    load_causal_lm,
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
    cached = {cache_argument(lm): cache, "use_cache": True}
    ids = torch.tensor([text], device=work.device)
    for _ in range(work.settings.max_new_tokens):
        output = lm(ids, **cached)
        probs = (output.logits[0, -1] / work.settings.temperature).softmax(-1)
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


def ppo(work, watch):
    """The same PPO on the same work."""
    settings, device = work.settings, work.device
    policy = PolicyWithValueHead(load_causal_lm(work.model, device)).to(device).eval()
    reference = PolicyWithValueHead(work.reference)
    reward_lm = AutoModelForCausalLM.from_pretrained(work.reward_model).to(device)
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
        with torch.no_grad():
            watch.switch("score")
            raw = []
            for i in range(0, len(ids), size):
                output = reward_lm(
                    ids[i : i + size],
                    attention_mask=attention_mask[i : i + size],
                    output_hidden_states=True,
                )
                last = torch.arange(len(output.logits)), lengths[i : i + size] - 1
                raw.append(work.reward.head(output.hidden_states[-1][last]))
            ended = ids[torch.arange(len(ids)), lengths - 1] == work.stop_id
            scores = work.normalised(torch.cat(raw), ended)
            watch.switch("log-probs")
            old, ref, old_values = [], [], []
            for i in range(0, len(ids), size):
                piece = ids[i : i + size], attention_mask[i : i + size]
                logprobs, values = forward(policy, *piece, settings.temperature)
                old.append(logprobs)
                old_values.append(values)
                ref.append(forward(reference, *piece, settings.temperature)[0])
            old, ref, old_values = map(torch.cat, (old, ref, old_values))
            rewards = token_rewards(scores, old, ref, mask, settings.kl_coef)
            advantages, returns = compute_gae(
                rewards, old_values, mask, settings.gamma, settings.gae_lambda
            )
            advantages = masked_whiten(advantages, mask)
        watch.switch("update")
        for _ in range(settings.ppo_epochs):
            order = torch.randperm(len(ids), generator=generator, device=device)
            for i in order.split(size):
                logprobs, values = forward(
                    policy, ids[i], attention_mask[i], settings.temperature
                )
                pi_loss, _ = policy_loss(
                    logprobs, old[i], advantages[i], mask[i], settings.clip_range
                )
                v_loss, _ = value_loss(
                    values,
                    old_values[i],
                    returns[i],
                    mask[i],
                    settings.value_clip_range,
                )
                (pi_loss + settings.value_coef * v_loss).backward()
                torch.nn.utils.clip_grad_norm_(
                    policy.parameters(), settings.max_grad_norm
                )
                optimizer.step()
                optimizer.zero_grad()
        watch.rollout_done(policy.lm)


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
        states = lm(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        last = torch.arange(len(ids), device=work.device), mask.sum(dim=1) - 1
        raw = head(states[-1][last])
        return F.binary_cross_entropy_with_logits(raw, labels)

    return train(
        work, torch.nn.ModuleList([lm, head]), rows, loss_of, work.settings.rm_lr
    )
