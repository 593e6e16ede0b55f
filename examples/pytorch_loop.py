"""A plain PyTorch loop over shards, that can be stopped and resumed.

`python examples/pytorch_loop.py SHARDS CHECKPOINT --steps 100`; again with more steps to resume.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import megaback


class TinyModel(nn.Module):
    """One recurrent layer: no good model, but a quick one."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 64)
        self.layer = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, vocab_size)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD, _ = self.layer(self.embedding(ids_BT))
        logits_BTV: torch.Tensor = self.head(hidden_BTD)
        return logits_BTV


def train(shards: str, checkpoint: Path, steps: int, workers: int) -> None:
    dataset = megaback.open_dataset(
        shards, context_tokens=64, global_batch_rows=16, micro_batch_rows=16, seed=1
    )
    loader = DataLoader(dataset, batch_size=16, num_workers=workers)
    torch.manual_seed(1)
    model = TinyModel(dataset.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        dataset.load_state_dict(saved["data"])
        step = saved["data"]["step"]
    while step < steps:
        dataset.set_epoch(step // dataset.steps_per_epoch)
        for batch in loader:
            logits_BTV = model(batch["input_ids"])
            loss = cross_entropy(logits_BTV.flatten(0, 1), batch["shift_labels"].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step} loss {loss.item():.6f}")
            if step == steps:
                break
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"data": dataset.state_at(step)}, checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    train(**vars(parser.parse_args()))
