"""A rank that reads rows by a plain loader, then trains with transformers' Trainer in several ways.

`python -m tests.helpers.trainer_rank SHARDS OUT`, with a rank's environment. Writes the rows that
it read to `OUT/RANK.npz`: ids and targets of shape (2, micro-batches, rows, tokens) for each way.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import megaback

EXAMPLE = Path(__file__).parents[2] / "examples/transformers_trainer.py"
STEP_ROWS = 16
MICRO_ROWS = 4
_ALL_ROWS = {"rank": 0, "world_size": 1}

seen: list[list[np.ndarray[Any, Any]]] = []
_training_step = Trainer.training_step


def _recorded(self: Trainer, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
    note(inputs)
    return _training_step(self, model, inputs, *rest)


def note(batch: dict[str, torch.Tensor]) -> None:
    seen.append([batch[key].numpy().copy() for key in ("input_ids", "shift_labels")])


def opened(shards: str, **options: Any) -> megaback.RowDataset:
    return megaback.open_dataset(
        shards, context_tokens=64, global_batch_rows=STEP_ROWS, seed=1, epochs=0.1, **options
    )


def trainer(
    folder: Path, dataset: megaback.RowDataset, workers: int = 2, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=MICRO_ROWS,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    shape = LlamaConfig(
        vocab_size=dataset.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return Trainer(LlamaForCausalLM(shape), arguments, train_dataset=dataset)


def main(shards: str, out: Path) -> None:
    Trainer.training_step = _recorded
    found: dict[str, Any] = {}

    def store(name: str) -> None:
        found[name] = np.stack([np.stack(both) for both in seen], axis=1)
        seen.clear()

    place = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    train_example = runpy.run_path(str(EXAMPLE))["train"]
    train_example(shards, str(out / f"alone-{place['RANK']}"), steps=3, workers=3)
    store("example, one rank")
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(place)

    torch.distributed.init_process_group("gloo")
    without_rank = dataset = opened(shards, micro_batch_rows=MICRO_ROWS)
    for batch in DataLoader(dataset, batch_size=MICRO_ROWS, num_workers=2):
        note(batch)
    store("plain")

    train_example(shards, str(out / "example"), steps=3, workers=2)
    store("example")

    dataset = opened(shards, micro_batch_rows=MICRO_ROWS * 2, **_ALL_ROWS)
    config = {"dispatch_batches": False}
    options = {"num_train_epochs": 2, "save_strategy": "no", "accelerator_config": config}
    trainer(out / "read", dataset, **options).train()
    store("read by every rank")

    dataset = opened(shards, micro_batch_rows=MICRO_ROWS, **_ALL_ROWS)
    steps = dataset.steps_per_epoch
    trainer(out / "resumed", dataset, 1, max_steps=steps + 1, save_steps=steps + 1).train()
    store("begun")
    begun = str(out / "resumed" / f"checkpoint-{steps + 1}")
    options = {"max_steps": 2 * steps, "save_strategy": "no"}
    dataset = opened(shards, micro_batch_rows=MICRO_ROWS, **_ALL_ROWS)
    trainer(out / "resumed", dataset, 3, **options).train(resume_from_checkpoint=begun)
    store("resumed")
    dataset = opened(shards, micro_batch_rows=MICRO_ROWS, **_ALL_ROWS)
    dataset.load_state_dict(dataset.state_at(steps + 1))
    resumed = trainer(out / "resumed", dataset, ignore_data_skip=True, **options)
    resumed.train(resume_from_checkpoint=begun)
    store("resumed by state")

    rank = torch.distributed.get_rank()
    dataset = opened(shards, micro_batch_rows=MICRO_ROWS, rank=rank, world_size=2)
    alone = trainer(out / "alone", dataset, num_train_epochs=1, save_strategy="no")
    alone.get_train_dataloader = lambda: DataLoader(dataset, batch_size=MICRO_ROWS, num_workers=2)
    alone.train()
    store("own part")

    try:
        trainer(out / "refused", without_rank)
    except megaback.errors.ConfigError as error:
        found["refused"] = str(error)
    np.savez(out / f"{rank}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
