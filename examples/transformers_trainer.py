"""transformers' Trainer over shards: `python examples/transformers_trainer.py SHARDS FOLDER`.

On several ranks: `torchrun --nproc-per-node 2 examples/transformers_trainer.py SHARDS FOLDER`.
"""

import argparse
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import megaback

STEP_ROWS = 16


def train(shards: str, folder: str, steps: int, workers: int) -> None:
    rows = STEP_ROWS // int(os.environ.get("WORLD_SIZE", "1"))
    dataset = megaback.open_dataset(
        shards,
        context_tokens=64,
        global_batch_rows=STEP_ROWS,
        micro_batch_rows=rows,
        seed=1,
        position_ids=True,  # attention stays within documents
        rank=0,  # the Trainer deals rows to ranks itself
        world_size=1,
    )
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        max_steps=steps,
        dataloader_num_workers=workers,
        remove_unused_columns=False,  # keeps shift_labels: the last target of each row
        use_cpu=not torch.cuda.is_available(),
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
    )
    set_seed(1)
    shape = LlamaConfig(
        vocab_size=dataset.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    Trainer(LlamaForCausalLM(shape), arguments, train_dataset=dataset).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    train(**vars(parser.parse_args()))
