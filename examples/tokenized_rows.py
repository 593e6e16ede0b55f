"""Rows of ids for trainers of texts: `python examples/tokenized_rows.py MODEL ROWS OUT`.

MODEL is a folder of `megaback convert --to hf`. ROWS are JSON lines with `text`, or with
`instruction`, perhaps `input`, and `output`. OUT is a folder of `datasets` with the split "train",
which LLaMA-Factory (`tokenized_path`) and axolotl (`datasets: path`) read. Rows that do not fit the
context are skipped.
"""

import argparse
from typing import Any

from datasets import DatasetDict, load_dataset
from transformers import AutoTokenizer


def encoded(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Ids, mask and labels of a row, in the order in which the model reads them."""
    if row.get("text") is not None:
        ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    return dict(tokenizer.example(row["instruction"], row["output"], row.get("input")))


def write(model: str, rows: str, out: str) -> int:
    """Number of rows written."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    texts = load_dataset("json", data_files=rows, split="train")
    dataset = texts.map(
        lambda row: encoded(row, tokenizer),
        remove_columns=texts.column_names,
        load_from_cache_file=False,
    ).filter(lambda row: len(row["input_ids"]) <= tokenizer.model_max_length)
    DatasetDict({"train": dataset}).save_to_disk(out)
    print(f"wrote {len(dataset)} of {len(texts)} rows to {out}")
    return len(dataset)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out")
    write(**vars(parser.parse_args()))
