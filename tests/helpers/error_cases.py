"""User errors, each with the command that makes it: see test_errors.py."""

from dataclasses import dataclass

from data_pipeline import errors
from data_pipeline.errors import (
    BadRecordError,
    BatchError,
    CheckpointCorruptError,
    CheckpointMissingError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    NonFiniteError,
    OutputExistsError,
    PromptError,
    RunMismatchError,
    ShardCorruptError,
    ShardsMissingError,
    SourceEmptyError,
    SourceMissingError,
    SourceUnreadableError,
    TokenizerError,
    TokenizerMismatchError,
)


@dataclass(frozen=True)
class Case:
    """A command with {place} and {out} for folders, and the error that it must give.

    `rank` runs a single rank by itself: faster than `train`, which starts two.
    """

    command: str
    kind: type[MegabackError]
    names: tuple[str, ...]


BUILD = "shards build --tokenizer {place}/tokenizer.model --out {out}/shards --source "
TOKENIZER = "tokenizer train --out {out}/tokenizer --source "
TRAIN = "train {place}/config.yaml run={out}/run "
OVER = "train {place}/config.yaml "
RANK = "rank {place}/config.yaml run={out}/run "
NEW = "new --device-name h100-80gb --out {out}/new.yaml "
RESUME = "rank {place}/config.yaml run={place}/backward_run training.steps=2 "

CASES = {
    "a missing source": Case(
        BUILD + "{place}/none.jsonl", SourceMissingError, ("{place}/none.jsonl",)
    ),
    "a missing source of a tokenizer": Case(
        TOKENIZER + "{place}/none.jsonl", SourceMissingError, ("{place}/none.jsonl",)
    ),
    "an empty source": Case(
        BUILD + "{place}/empty.jsonl", SourceEmptyError, ("{place}/empty.jsonl",)
    ),
    "a source of empty documents": Case(
        BUILD + "{place}/blank.jsonl", SourceEmptyError, ("{place}/blank.jsonl", "3")
    ),
    "a source of a tokenizer with empty documents": Case(
        TOKENIZER + "{place}/blank.jsonl", SourceEmptyError, ("{place}/blank.jsonl",)
    ),
    "a parquet file that cannot be read": Case(
        BUILD + "{place}/cut.parquet", SourceUnreadableError, ("{place}/cut.parquet",)
    ),
    "bad JSON on a line": Case(
        BUILD + "{place}/bad.jsonl", BadRecordError, ("{place}/bad.jsonl:3:",)
    ),
    "a record without text": Case(
        BUILD + "{place}/other_key.jsonl",
        BadRecordError,
        ("{place}/other_key.jsonl:2:", "'text'"),
    ),
    "a file that is not a tokenizer": Case(
        "shards build --tokenizer {place}/not_a_tokenizer.model --out {out}/shards "
        "--source {place}/text",
        TokenizerError,
        ("{place}/not_a_tokenizer.model",),
    ),
    "a folder with shards of another tokenizer": Case(
        "shards build --tokenizer {place}/other/tokenizer.model --out {place}/shards "
        "--source {place}/text",
        TokenizerMismatchError,
        ("{place}/shards",),
    ),
    "a folder with shards of the other direction": Case(
        "shards build --tokenizer {place}/tokenizer.model --out {place}/shards "
        "--source {place}/text --direction forward",
        DirectionMismatchError,
        ("{place}/shards", "'backward'", "'forward'"),
    ),
    "a folder with other files": Case(
        "shards build --tokenizer {place}/tokenizer.model --out {place}/text --source {place}/text",
        OutputExistsError,
        ("{place}/text",),
    ),
    "truncated shards, verified": Case(
        "shards verify {place}/cut_train_shards",
        ShardCorruptError,
        ("{place}/cut_train_shards/train-00000-00000.zst",),
    ),
    "a damaged frame, verified": Case(
        "shards verify {place}/damaged_shards",
        ShardCorruptError,
        ("{place}/damaged_shards/train-00000-00000.zst", "frame 0", "byte 0"),
    ),
    "a folder that is not shards, verified": Case(
        "shards verify {place}/unfinished", ShardsMissingError, ("{place}/unfinished",)
    ),
    "a folder that is not shards, inspected": Case(
        "shards inspect {place}/unfinished", ShardsMissingError, ("{place}/unfinished",)
    ),
    "a missing config": Case("train {place}/none.yaml", ConfigError, ("{place}/none.yaml",)),
    "a wrong key in the config": Case(
        TRAIN + "optimizer.learning_rat=1",
        ConfigError,
        ("{place}/config.yaml", "optimizer.learning_rat;", "optimizer.learning_rate?"),
    ),
    "a batch that the ranks cannot share": Case(
        TRAIN + "hardware.processes=3", BatchError, ("global_batch_rows 8", "3 ranks")
    ),
    "lanes that do not divide the batch": Case(
        TRAIN + "data.lanes=3", BatchError, ("lanes 3", "global_batch_rows 8")
    ),
    "a context that does not divide the frames": Case(
        TRAIN + "batch.context_tokens=96", ConfigError, ("context_tokens is 96", "1024")
    ),
    "training on a folder that is not shards": Case(
        TRAIN + "data.shards={place}/unfinished", ShardsMissingError, ("{place}/unfinished",)
    ),
    "training on truncated shards": Case(
        TRAIN + "data.shards={place}/cut_train_shards",
        ShardCorruptError,
        ("{place}/cut_train_shards/train-00000-00000.zst",),
    ),
    "validating on truncated shards": Case(
        TRAIN + "data.shards={place}/cut_val_shards",
        ShardCorruptError,
        ("{place}/cut_val_shards/val-00000-00000.zst",),
    ),
    "training on a damaged frame": Case(
        RANK + "data.shards={place}/damaged_shards",
        ShardCorruptError,
        ("{place}/damaged_shards/train-00000-00000.zst", "frame 0", "byte 0"),
    ),
    "a learning rate that breaks the model": Case(
        RANK + "optimizer.learning_rate=1.0e+25 optimizer.warmup_steps=0 guard.max_skipped_steps=0",
        NonFiniteError,
        ("step 2", "optimizer.learning_rate"),
    ),
    "a model too large for this machine's memory": Case(
        RANK + "model.width=65536 model.num_layers=64 batch.micro_batch_rows=1",
        errors.NotEnoughMemoryError,
        ("GB for each of 1 processes", "use a smaller model", "hardware.memory_check=off"),
    ),
    "reading word shards in the other direction": Case(
        TRAIN + "data.shards={place}/word_shards data.direction=forward",
        DirectionMismatchError,
        ("'forward'", "'backward'", "word"),
    ),
    "resuming with shards of another tokenizer": Case(
        RESUME + "data.shards={place}/other_shards",
        TokenizerMismatchError,
        ("{place}/other_shards",),
    ),
    "resuming with other shards": Case(
        RESUME + "data.shards={place}/more_shards", RunMismatchError, ("{place}/more_shards",)
    ),
    "resuming in the other direction": Case(
        RESUME.replace("rank", "train") + "data.direction=forward",
        DirectionMismatchError,
        ("'backward'", "'forward'"),
    ),
    "resuming with another model": Case(
        RESUME + "model.num_layers=3",
        RunMismatchError,
        ("began with model.num_layers = 2, and the config has model.num_layers = 3; use",),
    ),
    "resuming with another optimizer": Case(
        RESUME + "optimizer.name=muon",
        RunMismatchError,
        ("began with optimizer.name = adamw, and the config has optimizer.name = muon; use",),
    ),
    "resuming from a damaged checkpoint": Case(
        "rank {place}/config.yaml run={place}/damaged_run",
        CheckpointCorruptError,
        ("{place}/damaged_run", "weights-00000.safetensors"),
    ),
    "starting from a model of the other direction": Case(
        RANK + "init_from={place}/forward_model",
        DirectionMismatchError,
        ("{place}/forward_model", "'forward'", "'backward'"),
    ),
    "starting from a model of another shape": Case(
        RANK + "init_from={place}/backward_model model.width=64",
        RunMismatchError,
        ("{place}/backward_model", "width is 32 there and 64 here"),
    ),
    "starting from a folder that is not a model": Case(
        RANK + "init_from={place}/unfinished", CheckpointMissingError, ("{place}/unfinished",)
    ),
    "importing a folder without a model": Case(
        "import model {place}/unfinished --direction backward --out {out}/model",
        CheckpointMissingError,
        ("{place}/unfinished", "config.json"),
    ),
    "converting a run without a complete checkpoint": Case(
        "convert {place}/incomplete_run --out {out}/model",
        CheckpointMissingError,
        ("{place}/incomplete_run",),
    ),
    "converting a folder that is not a run": Case(
        "convert {place}/none --out {out}/model", CheckpointMissingError, ("{place}/none",)
    ),
    "converting a damaged checkpoint": Case(
        "convert {place}/damaged_run --out {out}/model",
        CheckpointCorruptError,
        ("{place}/damaged_run", "weights-00000.safetensors"),
    ),
    "converting into a folder that is not empty": Case(
        "convert {place}/backward_run --out {place}/text", OutputExistsError, ("{place}/text",)
    ),
    "sampling from a checkpoint that is not converted": Case(
        "sample {place}/incomplete_run --ending end",
        CheckpointMissingError,
        ("{place}/incomplete_run",),
    ),
    "an ending that is longer than the context": Case(
        "sample {place}/backward_model --ending " + "0123456789" * 10,
        PromptError,
        ("100 tokens", "64"),
    ),
    "a beginning for a backward model": Case(
        "sample {place}/backward_model --beginning once",
        DirectionMismatchError,
        ("{place}/backward_model", "--beginning", "backward", "forward"),
    ),
    "an ending for a forward model": Case(
        "sample {place}/forward_model --ending end",
        DirectionMismatchError,
        ("{place}/forward_model", "--ending", "backward", "forward"),
    ),
    "both an ending and a beginning": Case(
        "sample {place}/forward_model --ending end --beginning once",
        PromptError,
        ("--ending", "--beginning"),
    ),
    "a run in a data set": Case(
        OVER + "run={place}/shards", OutputExistsError, ("{place}/shards",)
    ),
    "a run among texts": Case(OVER + "run={place}/text", OutputExistsError, ("{place}/text",)),
    "a run around its config and its data": Case(
        OVER + "run={place}", OutputExistsError, ("{place}",)
    ),
    "a rank without a launcher, among texts": Case(
        "rank {place}/config.yaml run={place}/text", OutputExistsError, ("{place}/text",)
    ),
    "copies of checkpoints among texts": Case(
        "rank {place}/config.yaml run={out}/text checkpoint.copy_to={place}",
        OutputExistsError,
        ("checkpoint.copy_to", "{place}/text"),
    ),
    "copies of checkpoints over those of another run": Case(
        RESUME + "checkpoint.copy_to={place}/copies",
        OutputExistsError,
        ("{place}/copies/backward_run", "another run", "'forward'"),
    ),
    "a run that is submitted, among texts": Case(
        "submit {place}/config.yaml run={place}/text --cpu --dry-run",
        OutputExistsError,
        ("{place}/text",),
    ),
    "scores over their own input": Case(
        "score {place}/backward_model --in {place}/bad.jsonl --out {place}/bad.jsonl --overwrite",
        OutputExistsError,
        ("{place}/bad.jsonl", "the input"),
    ),
    "scores over a file of the user": Case(
        "score {place}/backward_model --in {place}/blank.jsonl --out {place}/bad.jsonl --overwrite",
        OutputExistsError,
        ("{place}/bad.jsonl", "did not write"),
    ),
    "a ranking over a model's file": Case(
        "rerank {place}/backward_model --in {place}/bad.jsonl "
        "--out {place}/backward_model/config.json --overwrite",
        OutputExistsError,
        ("{place}/backward_model/config.json", "is within"),
    ),
    "a report over a file of the user": Case(
        "rerank {place}/backward_model --in {place}/bad.jsonl --out {out}/ranked.jsonl "
        "--report {place}/config.yaml --overwrite",
        OutputExistsError,
        ("--report {place}/config.yaml",),
    ),
    "an evaluation over a file of the user": Case(
        "eval {place}/backward_model --suite bits-per-byte --shards {place}/shards "
        "--out {place}/config.yaml --overwrite",
        OutputExistsError,
        ("{place}/config.yaml",),
    ),
    "predictions over a file of the user": Case(
        "eval {place}/backward_model --suite bits-per-byte --shards {place}/shards "
        "--predictions {place}/bad.jsonl --overwrite",
        OutputExistsError,
        ("--predictions {place}/bad.jsonl",),
    ),
    "curves over a picture of the user": Case(
        "plot {place}/backward_run --out {place}/photo --overwrite",
        OutputExistsError,
        ("{place}/photo.png",),
    ),
    "lengths over a picture of the user": Case(
        "shards inspect {place}/shards --plot {place}/photo.png --overwrite",
        OutputExistsError,
        ("{place}/photo.png",),
    ),
    "shards over a tokenizer": Case(
        "shards build --tokenizer {place}/lone/tokenizer.model --out {place}/lone "
        "--source {place}/none.jsonl",
        OutputExistsError,
        ("{place}/lone",),
    ),
    "shards rewritten within a data set": Case(
        "shards recompress {place}/shards --out {place}/shards/small",
        OutputExistsError,
        ("{place}/shards/small",),
    ),
    "scores of documents over a file of the user": Case(
        "shards score {place}/shards --forward {place}/backward_model "
        "--backward {place}/backward_model --out {place}/bad.jsonl --overwrite",
        OutputExistsError,
        ("{place}/bad.jsonl", "did not write"),
    ),
    "documents scored by two backward models": Case(
        "shards score {place}/shards --forward {place}/backward_model "
        "--backward {place}/backward_model --out {out}/scores.jsonl",
        DirectionMismatchError,
        ("the forward model writes backward",),
    ),
    "documents selected by other lines than scores": Case(
        "shards select {place}/shards --scores {place}/blank.jsonl --keep-fraction 0.5 "
        "--out {out}/best",
        BadRecordError,
        ("{place}/blank.jsonl:1", "shards score"),
    ),
    "a model within a model": Case(
        "convert {place}/backward_model --out {place}/backward_model/hf --to hf",
        OutputExistsError,
        ("{place}/backward_model/hf",),
    ),
    "a new config for fewer parameters than any model has": Case(
        NEW + "--parameters 5", ConfigError, ("--parameters is 5", "the smallest model has")
    ),
    "a new config for less than a step": Case(
        NEW + "--flops 10 --shards {place}/shards", ConfigError, ("this budget suffices for",)
    ),
    "a new config of a model that its device cannot hold": Case(
        "new --device-name cpu --memory-gb 8 --parameters 7B --out {out}/new.yaml",
        errors.NotEnoughMemoryError,
        ("does not fit 1 x 1 cpu",),
    ),
    "a new config for shards that do not exist": Case(
        NEW + "--parameters 1M --shards {place}/none", ShardsMissingError, ("{place}/none",)
    ),
    "a new config over the config of the user": Case(
        "new --parameters 1M --device-name h100-80gb --out {place}/config.yaml --overwrite",
        OutputExistsError,
        ("--out {place}/config.yaml",),
    ),
    "a device that does not exist": Case(
        "sample {place}/backward_model --ending end --device gpu0", errors.BackendError, ("gpu0",)
    ),
}
