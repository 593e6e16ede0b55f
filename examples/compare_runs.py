"""The loss curves of runs in one figure, and the last validation of each.

`python examples/compare_runs.py runs/a runs/b --out curves.png`, with matplotlib installed.
`megaback plot` draws more than this; start here for figures of your own.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

import megaback


def compare(runs: list[Path], out: Path) -> dict[str, float]:
    """Write the figure. The last val loss of each run, in nats per token."""
    last = {}
    figure, axes = plt.subplots()
    for run in runs:
        lines = megaback.read_metrics(run)
        # A line is a training step or a validation; the loss of a skipped step is None.
        steps = [line for line in lines if line.get("loss") is not None]
        validations = [line for line in lines if "val_loss" in line]
        tokens = [line["tokens_seen"] for line in steps]
        axes.plot(tokens, [line["loss"] for line in steps], label=run.name)
        if validations:
            last[run.name] = validations[-1]["val_loss"]
    axes.set(xlabel="tokens", ylabel="training loss, nats per token")
    axes.legend()
    figure.savefig(out)
    plt.close(figure)
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    for name, val_loss in compare(**vars(parser.parse_args())).items():
        print(f"{name}: val loss {val_loss:.4f} nats per token")
