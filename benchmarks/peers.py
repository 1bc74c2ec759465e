"""The same work for TRL's `PPOTrainer` and for `transformers.Trainer`."""

import tempfile
import time

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from more.common import peak_memory
from utils.data import lm_labels, pad


def classifier(work, mean=0.0, std=1.0):
    """Our reward model as TRL wants one, with the normalisation in its head."""
    model = AutoModelForSequenceClassification.from_pretrained(
        work.model, num_labels=1, dtype=torch.float32
    )
    head = work.reward.head
    model.score = torch.nn.Linear(head.in_features, 1).to(work.device)
    model.score.weight.data = head.weight.data / std
    model.score.bias.data = (head.bias.data - mean) / std
    return model.to(work.device)


def ppo(work, watch):
    """TRL's `PPOTrainer` with our settings, where it has them."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    s, tokenizer = work.settings, work.tokenizer
    # An id of its own for padding, which is never written
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work.unlikely[1])
    tokenizer.padding_side = "left"
    rows = [row for step in range(s.ppo_steps) for row in work.prompts_of(step)]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
        for _ in range(2)
    )
    reward_model, value_model = classifier(work, *work.scale), classifier(work)
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

    class Judge(TrainerCallback):
        def on_step_end(self, *_, **__):
            watch.rollout_done()

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        callbacks=[Judge()],
    )
    # Which phase it is in shows in the functions of its module that it calls
    of = {name: getattr(ppo_trainer, name) for name in ("get_reward", "forward")}
    score = watch.timed("score", of["get_reward"])

    def get_reward(model, *arguments):
        scoring = model is trainer.reward_model
        return (score if scoring else of["get_reward"])(model, *arguments)

    def forward(*arguments):
        watch.switch("update" if torch.is_grad_enabled() else "log-probs")
        return of["forward"](*arguments)

    generate = watch.timed("generate", ppo_trainer.batch_generation)
    ppo_trainer.batch_generation = generate
    ppo_trainer.get_reward, ppo_trainer.forward = get_reward, forward
    trainer.train()


class Stopwatch(TrainerCallback):
    """From the beginning of the training to its end."""

    def on_train_begin(self, *_, **__):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_end(self, *_, **__):
        """Stop it."""
        self.seconds = time.perf_counter() - self.started


def train(work, model, rows, labels_of, lr):
    """One epoch of `transformers.Trainer` with its defaults."""

    def collate(batch):
        ids, mask = pad([row["input_ids"] for row in batch], 0)
        labels = labels_of(ids, mask, [row["label"] for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    stopwatch = Stopwatch()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=work.device.type == "cpu",
        remove_unused_columns=False,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        learning_rate=lr,
        seed=work.seed,
    )
    columns = {"input_ids": [row for row, _ in rows], "label": [y for _, y in rows]}
    Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=datasets.Dataset.from_dict(columns),
        callbacks=[stopwatch],
    ).train()
    return {"seconds": stopwatch.seconds, "memory": peak_memory(work.device)}


def sft(work, rows):
    """Fine-tuning with the model's own loss."""
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)

    def labels_of(ids, mask, _):
        return lm_labels(ids, mask)

    return train(work, model, rows, labels_of, work.settings.sft_lr)


def rm(work, rows):
    """The library's classifier with binary cross-entropy."""
    model = AutoModelForSequenceClassification.from_pretrained(
        work.model,
        num_labels=1,
        problem_type="multi_label_classification",
        dtype=torch.float32,
        pad_token_id=0,
    )

    def labels_of(ids, mask, labels):
        return torch.tensor(labels).float()[:, None]

    return train(work, model, rows, labels_of, work.settings.rm_lr)
