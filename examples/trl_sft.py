"""TRL's SFTTrainer on an export: `python examples/trl_sft.py MODEL ROWS OUT`.

MODEL is a folder of `megaback convert --to hf`. ROWS are JSON lines with `instruction`, perhaps
`input`, and `output`. A backward model learns to write the instruction for an output, a forward
model the output. OUT is a model for transformers and for megaback.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def examples(rows: str, tokenizer: Any) -> Dataset:
    """Ids and labels of the rows that fit the context.

    TRL would encode texts in the wrong order, and cut off the ends of long rows.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.example(row["instruction"], row["output"], row.get("input"))
        return {name: encoded[name] for name in ("input_ids", "labels")}

    dataset = load_dataset("json", data_files=rows, split="train")
    dataset = dataset.map(encode, remove_columns=dataset.column_names)
    return dataset.filter(lambda row: len(row["input_ids"]) <= tokenizer.model_max_length)


def train(model: str, rows: str, out: str, steps: int, batch_rows: int, rate: float) -> SFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    on_gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        SFTConfig(
            out,
            max_steps=steps,
            per_device_train_batch_size=batch_rows,
            learning_rate=rate,
            max_length=None,  # cut nothing
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=examples(rows, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-5)
    train(**vars(parser.parse_args()))
