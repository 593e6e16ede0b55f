"""`megaback lm-eval`: EleutherAI's lm-evaluation-harness with the model `megaback` registered."""

import sys
from importlib import import_module

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.packages import require_package

_MODEL = "tools.harness.lm_eval_model:MegabackLM"


def register() -> None:
    """Let lm_eval find the model `megaback`, also in versions without entry points."""
    require_package("lm_eval", "`megaback lm-eval`", "'megaback[eval]'")
    import_module("lm_eval.models")  # its own models, which are registered only if there are none
    registry = import_module("lm_eval.api.registry").model_registry
    if "megaback" not in registry:
        registry.register("megaback", target=_MODEL)


@click.command(
    cls=Command,
    name="lm-eval",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "megaback lm-eval run --model megaback --model_args pretrained=models/xcoax "
        "--tasks openbookqa,arc_easy",
        "megaback lm-eval run --model megaback --model_args "
        "pretrained=models/xcoax,scoring=joint --tasks winogrande --limit 200",
        "megaback lm-eval ls tasks",
    ),
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENT…")
def main(arguments: tuple[str, ...]) -> None:
    """Run lm_eval with every ARGUMENT as it is, where --model megaback is a model of megaback.

    After `--`, --help is lm_eval's own.
    """
    register()
    sys.argv = ["lm-eval", *(arguments or ("--help",))]
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
