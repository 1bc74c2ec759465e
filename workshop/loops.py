"""The same PPO in three loops: notebook 3's, one without a thought for speed, TRL's."""

import tempfile

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)

from practice.cells import LOOP, import_cells
from utils.data import pad
from utils.models import load_causal_lm, position_ids
from utils.ppo import token_logprobs
from utils.rollout import response_tokens, sample_responses
from utils.settings import NOTEBOOKS


def clock(loop, watch):
    """Put a clock around the parts of notebook 3's loop, in its own names."""
    phases = {"sample_responses": "generate", "collect_rollout": "log-probs"}
    for name, phase in {**phases, "ppo_update": "update"}.items():
        loop[name] = watch.timed(phase, loop[name])


def ours(work, watch, score=None, **others):
    """`train` of notebook 3 with a clock around its parts, or around others."""
    loop, settings = import_cells(NOTEBOOKS["3"], *LOOP), work.settings
    loop.update(others)
    clock(loop, watch)
    run = loop["fresh_run"](load_causal_lm(work.model, work.device), settings)
    run.generator.manual_seed(work.seed)
    models = (work.reference, watch.timed("score", score or work.score))
    how = {"advantages": loop["ppo_advantages"], "update": loop["ppo_update"]}
    how |= {"collect": loop["collect_rollout"]}
    how |= {"pause": lambda step: watch.rollout_done()}
    loop["train"](run, *models, work.prompts_of, work.stop_id, settings, **how)


def states_and_logits(lm, ids, attention_mask):
    """Hidden states and logits of a whole language model at every place of a text."""
    how = {"attention_mask": attention_mask, "output_hidden_states": True}
    output = lm(ids, position_ids=position_ids(attention_mask), **how)
    return output.hidden_states[-1], output.logits


def slow_parts(work) -> dict:
    """Parts of notebook 3's loop as one would write them first, by their names."""
    reward_lm = load_causal_lm(work.model, work.device)

    def one_by_one(lm, prompts, attention_mask, eos_id, *how):
        rows = zip(prompts, attention_mask.bool(), strict=True)
        rows = ((row[real][None], real[real][None].long()) for row, real in rows)
        found = [sample_responses(lm, *row, eos_id, *how) for row in rows]
        rows = [row for ids, _, mask in found for row in response_tokens(ids, mask)]
        responses, mask = (x.to(prompts.device) for x in pad(rows, eos_id))
        texts = torch.cat([prompts, responses], dim=1)
        return texts, torch.cat([attention_mask, mask], dim=1), mask

    def logprobs(lm, ids, attention_mask, mask, temperature):
        _, logits = states_and_logits(lm, ids, attention_mask)
        each = token_logprobs(logits[:, :-1], ids[:, 1:], temperature)
        return each[:, -mask.shape[1] :] * mask.to(ids.device)

    def evaluate(policy, ids, attention_mask, mask, temperature):
        states, logits = states_and_logits(policy.lm, ids, attention_mask)
        each = token_logprobs(logits[:, :-1], ids[:, 1:], temperature)
        both = each, policy.value_head(states[:, :-1])
        return tuple(x[:, -mask.shape[1] :] * mask.to(ids.device) for x in both)

    def score(ids, attention_mask, mask):
        states, _ = states_and_logits(reward_lm, ids, attention_mask)
        last = attention_mask.cumsum(dim=1).argmax(dim=1)  # the first one at its end
        raw = work.reward.head(states[torch.arange(len(last)), last])
        return raw, raw

    parts = {"sample_responses": one_by_one, "response_logprobs": logprobs}
    return {**parts, "evaluate_responses": evaluate, "score": score}


def naive(work, watch):
    """The loop as one would write it first: right, and slow.

    One prompt at a time is continued, and every place of every text is projected to the
    whole vocabulary, by the reward model too. The rest is notebook 3's.
    """
    ours(work, watch, **slow_parts(work))


def _classifier(work):
    """Our reward model as TRL wants one."""
    model = AutoModelForSequenceClassification.from_pretrained(
        work.model, num_labels=1, dtype=torch.float32
    )
    head = work.reward.head
    model.score = torch.nn.Linear(head.in_features, 1)
    model.score.load_state_dict(head.state_dict())
    return model.to(work.device)


def trl(work, watch):
    """TRL's `PPOTrainer` with our settings, where it has them."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    s, tokenizer = work.settings, work.tokenizer
    # An id of its own for padding, which is never written
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work.pad_id)
    tokenizer.padding_side = "left"
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(work.model, dtype=torch.float32) for _ in range(2))
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=work.device.type == "cpu",
        gradient_checkpointing=False,
        num_sample_generations=0,
        seed=work.seed,
        total_episodes=s.ppo_episodes,
        # Otherwise it would step once an epoch, not once a minibatch
        per_device_train_batch_size=s.ppo_rollout_size,
        gradient_accumulation_steps=1,
        num_mini_batches=s.ppo_rollout_size // s.ppo_minibatch_size,
        local_rollout_forward_batch_size=s.ppo_minibatch_size,
        num_ppo_epochs=s.ppo_epochs,
        learning_rate=s.ppo_lr,
        adam_epsilon=1e-5,
        kl_coef=s.kl_coef,
        cliprange=s.clip_range,
        cliprange_value=s.value_clip_range,
        vf_coef=s.value_coef,
        gamma=1.0,
        lam=s.gae_lambda,
        temperature=s.temperature,
        response_length=s.max_new_tokens,
        stop_token_id=work.stop_id,
        missing_eos_penalty=None,
    )
    callback = TrainerCallback()
    callback.on_step_end = lambda *_, **__: watch.rollout_done()
    rows = [row for step in range(s.ppo_steps) for row in work.prompts_of(step)]
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=_classifier(work),
        value_model=_classifier(work),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        callbacks=[callback],
    )
    # Which phase it is in shows in the functions of its module that it calls
    get_reward, forward = ppo_trainer.get_reward, ppo_trainer.forward
    score = watch.timed("score", get_reward)

    def reward_of(model, *arguments):  # TRL asks the value model, too
        scoring = model is trainer.reward_model
        return (score if scoring else get_reward)(model, *arguments)

    def forward_of(*arguments):
        watch.switch("update" if torch.is_grad_enabled() else "log-probs")
        return forward(*arguments)

    generate = watch.timed("generate", ppo_trainer.batch_generation)
    ppo_trainer.batch_generation = generate
    ppo_trainer.get_reward, ppo_trainer.forward = reward_of, forward_of
    trainer.train()
