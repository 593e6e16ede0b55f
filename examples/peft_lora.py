"""LoRA by PEFT and transformers' Trainer: `python examples/peft_lora.py MODEL TEXTS OUT`.

MODEL is a folder of `megaback convert --to hf`, TEXTS a file of JSON lines with `text`. OUT/adapter
has the adapter, and OUT/merged the model merged with it, for transformers and for megaback.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)


def documents(texts: str, tokenizer: Any, context_tokens: int) -> Dataset:
    """Ids of each text between its markers; a long one is cut where it would be read last."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
        return {"input_ids": ids[:context_tokens]}

    dataset = load_dataset("json", data_files=texts, split="train")
    return dataset.map(encode, remove_columns=dataset.column_names)


def train(
    model: str, texts: str, out: str, steps: int, batch_rows: int, rate: float, rank: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    set_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    Trainer(
        lora,
        TrainingArguments(
            f"{out}/trainer",
            max_steps=steps,
            per_device_train_batch_size=batch_rows,
            learning_rate=rate,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=documents(texts, tokenizer, tokenizer.model_max_length),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    lora.save_pretrained(f"{out}/adapter")
    lora.merge_and_unload().save_pretrained(f"{out}/merged")
    tokenizer.save_pretrained(f"{out}/merged")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    train(**vars(parser.parse_args()))
