"""A backward model as the reward of TRL's GRPOTrainer.

`python examples/grpo_reward.py MODEL REWARD ROWS OUT` trains MODEL, a transformers chat model, to
write answers that a backward model of megaback, in REWARD, finds likely to have the question:
log P(question | answer) - log P(question), in nats. ROWS are JSON lines with `question`.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import megaback
from megaback.errors import PromptError

Reward = Callable[..., list[float | None]]


def reward_of(scorer: megaback.Scorer) -> Reward:
    """A reward function; GRPO ignores its None, for a pair that does not fit the context."""

    def reward(question: list[str], completions: list[Any], **_: Any) -> list[float | None]:
        fitting = []
        for number, (asked, messages) in enumerate(zip(question, completions, strict=True)):
            pair = megaback.Pair(asked, messages[-1]["content"])
            with suppress(PromptError):
                fitting.append((number, scorer.encoder.encode(pair)))
        scores = dict(scorer.score_all(fitting))
        return [scores[i].log_ratio if i in scores else None for i in range(len(question))]

    return reward


def train(
    model: str, reward: str, rows: str, out: str, steps: int, samples: int, tokens: int, rate: float
) -> GRPOTrainer:
    questions = load_dataset("json", data_files=rows, split="train").map(
        lambda row: {"prompt": [{"role": "user", "content": row["question"]}]}
    )
    on_gpu = torch.cuda.is_available()
    with megaback.load_scorer(reward) as scorer:
        trainer = GRPOTrainer(
            model,
            reward_of(scorer),
            GRPOConfig(
                out,
                max_steps=steps,
                num_generations=samples,
                per_device_train_batch_size=samples,
                max_completion_length=tokens,
                learning_rate=rate,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=questions,
        )
        trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("reward")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-6)
    train(**vars(parser.parse_args()))
