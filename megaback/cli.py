"""The `megaback` command, a click group that imports a subcommand when it is used.

Nothing heavy is imported here, so that help appears at once. Each subcommand also runs as
`python -m MODULE`.
"""

import importlib
import sys
from difflib import get_close_matches
from typing import Any

import click
from click.shell_completion import CompletionItem

from data_pipeline.common.command import CommandGroup, examples, report, run_as_process, scrubbed
from data_pipeline.common.logging_setup import verbose_option
from data_pipeline.errors import LaunchError
from megaback.installation import missing_module

_Commands = dict[str, tuple[str, str]]

# name: (module that serves it, short help)
_COMMANDS: _Commands = {
    "new": ("tools.new", "Write the config of a run for a size, a time or FLOPs."),
    "plan": ("launcher.plan", "Estimate a run's memory, time, network and disk."),
    "config": ("tools.config", "Show a config with its defaults, or explain its keys."),
    "rehearse": ("launcher.rehearse", "Rehearse single ranks of a large run on this machine."),
    "profile": ("launcher.profile", "Profile training steps: time by part, trace, memory."),
    "submit": ("launcher.slurm.submit", "Check a run, and submit it to a Slurm cluster."),
    "jobs": ("launcher.slurm.jobs", "Show runs, their Slurm jobs, and their progress."),
    "train": ("launcher.train", "Train on this machine or on several, through DeepSpeed."),
    "doctor": ("launcher.doctor", "Check this machine's setup, and suggest fixes."),
    "plot": ("tools.plot", "Plot the curves of one or several runs."),
    "status": ("tools.status", "Show a run's progress, history and expected end."),
    "arrow": ("tools.arrow", "Compare a model's two directions on the same documents."),
    "sweep": ("tools.sweep", "Train a config with lists of values, and compare the losses."),
    "watch": ("tools.watch", "Report whether a run is healthy, slow, stuck or dead."),
    "rollback": ("tools.rollback", "Roll back to an earlier checkpoint, and skip the steps since."),
    "inspect": (
        "tools.inspect_path",
        "Identify a data set, run or model, and check it.",
    ),
    "convert": ("tools.convert", "Export a checkpoint: full, Hugging Face or GGUF."),
    "chat": ("tools.chat", "Generate the instruction for a response."),
    "backtranslate": ("tools.backtranslate", "Generate instructions for texts, to fine-tune on."),
    "rerank": ("tools.rerank", "Rank answers by how well they explain their question."),
    "score": ("tools.score", "Score how well each answer explains its question."),
    "eval": ("tools.evaluate", "Evaluate a model on held-out data."),
    "lm-eval": ("tools.lm_eval", "Run lm_eval's tasks on a model of either direction."),
    "sample": ("tools.sample", "Generate the text before an ending."),
    "infill": ("tools.infill", "Generate the text between a beginning and an ending."),
    "serve": ("tools.serve", "Serve a model through OpenAI's API, and as a web page."),
}
_INTERNAL: _Commands = {"slurm-job": ("launcher.slurm.job", "")}
"""Commands for batch files, where `python -m launcher…` could import another project's package."""
_GROUPS: dict[str, tuple[str, _Commands]] = {
    "tokenizer": (
        "Train a tokenizer.",
        {
            "train": (
                "data_pipeline.tokenizer.train_tokenizer",
                "Train a SentencePiece model on a source.",
            )
        },
    ),
    "instruct": (
        "Build data sets for fine-tuning.",
        {"build": ("data_pipeline.build.instruct", "Encode instruction rows into shards.")},
    ),
    "import": (
        "Bring tokenizers, models and data of other programs.",
        {
            "tokenizer": (
                "data_pipeline.tokenizer.import_tokenizer",
                "Add our markers to another model's tokenizer.json.",
            ),
            "model": ("tools.import_model", "Import a checkpoint of transformers or DeepSpeed."),
            "shards": (
                "data_pipeline.build.import_shards",
                "Import token ids of nanoGPT, Megatron-LM, datatrove or MDS into shards.",
            ),
        },
    ),
    "shards": (
        "Build and inspect data sets.",
        {
            "plan": (
                "data_pipeline.build.plan_command",
                "List the sources, and split them into tasks.",
            ),
            "build": (
                "data_pipeline.build.command",
                "Encode a source into shards of reversed tokens.",
            ),
            "finalize": (
                "data_pipeline.build.finalize",
                "Write the manifest of a build whose tasks are done.",
            ),
            "verify": ("data_pipeline.shards.verify", "Decode and re-hash every shard."),
            "recompress": (
                "data_pipeline.shards.recompress",
                "Rewrite the shards with other compression.",
            ),
            "score": ("tools.score_shards", "Score documents by a pair of models."),
            "select": (
                "data_pipeline.shards.document_selection",
                "Write the documents with the best scores as a new data set.",
            ),
            "inspect": ("data_pipeline.shards.inspection", "Show the contents of a data set."),
            "locate": ("tools.locate", "Show the steps of a run that read a document."),
        },
    ),
}


class LazyGroup(CommandGroup):
    """Group whose commands are modules, each imported when it runs or shows its own help."""

    def __init__(self, name: str, modules: _Commands, help_text: str, epilog: str = "") -> None:
        super().__init__(name, help=help_text, epilog=epilog, params=[verbose_option()])
        self._modules = modules

    def main(self, *arguments: Any, **options: Any) -> Any:
        return run_as_process(super().main, *arguments, **options)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            known = [name for name, _ in self._short_helps()]
            if args[0].startswith("-") or not (close := get_close_matches(args[0], known)):
                raise scrubbed(error) from None
            meant = " or ".join(repr(name) for name in close)
            message = f"No such command {args[0]!r}. Did you mean {meant}?"
            raise scrubbed(click.UsageError(message, ctx)) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        shown = [name for name, (_, text) in self._modules.items() if text]
        return [*shown, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return super().get_command(ctx, cmd_name)
        try:
            module = importlib.import_module(self._modules[cmd_name][0])
        except ModuleNotFoundError as error:
            reason = missing_module(error.name or "")
            if reason is None:
                raise
            sys.exit(report(LaunchError(reason)))
        command: click.Command = module.main
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and options, without importing the commands' modules."""
        names = [
            CompletionItem(name, help=text)
            for name, text in self._short_helps()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self._short_helps())

    def _short_helps(self) -> list[tuple[str, str]]:
        """Commands that help lists, in the order of their names, each with one line."""
        rows = [(name, text) for name, (_, text) in self._modules.items() if text]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        return sorted(rows)


def command_modules() -> dict[str, str]:
    """Module of each subcommand, by the words that are typed."""
    modules = {name: module for name, (module, _) in _COMMANDS.items()}
    for group, (_, commands) in _GROUPS.items():
        modules |= {f"{group} {name}": module for name, (module, _) in commands.items()}
    return modules


def _build_cli() -> click.Group:
    from megaback import __version__

    epilog = examples(
        "megaback doctor",
        "megaback tokenizer train --source pydocs --out data/tokenizer",
        "megaback shards build --source pydocs --tokenizer data/tokenizer/tokenizer.model "
        "--out data/pydocs",
        "megaback train configs/demo.yaml run=runs/pydocs data.shards=data/pydocs",
        'megaback sample runs/pydocs --ending "and they lived happily ever after."',
    )
    help_text = "Train and use GPTs that write backwards."
    cli = LazyGroup("megaback", _COMMANDS | _INTERNAL, help_text, epilog)
    for name, (help_text, commands) in _GROUPS.items():
        cli.add_command(LazyGroup(name, commands, help_text))
    return click.version_option(__version__, prog_name="megaback")(cli)


main = _build_cli()

if __name__ == "__main__":
    main(prog_name="megaback")
