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
    start, stop, instruction, response = tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>", "<|instruction|>", "<|response|>"]
    )

    def part(role: int, text: str) -> list[int]:
        return [start, role, *tokenizer(text.strip(), add_special_tokens=False).input_ids, stop]

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        asked = f"{row['instruction'].strip()} {(row.get('input') or '').strip()}"
        given, written = part(response, row["output"]), part(instruction, asked)
        if tokenizer.direction == "forward":
            given, written = written, given
        # The loss is on the written text and its end marker.
        labels = [-100] * (len(given) + 2) + written[2:]
        return {"input_ids": given + written, "labels": labels}

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
