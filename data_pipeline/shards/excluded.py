"""Report of the documents and records of the sources that are not in a data set."""

import click

from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.skipped import skipped_lines


def echo_excluded(manifest: Manifest) -> None:
    """Print the numbers of excluded documents and skipped records, by cause."""
    if manifest.excluded:
        counted = ", ".join(
            f"{number:,} ({name.replace('_', ' ')})" for name, number in manifest.excluded.items()
        )
        click.echo(f"{noun_of(manifest)} excluded: {counted}")
    for line in skipped_lines(manifest.skipped):
        click.echo(line)


def noun_of(manifest: Manifest) -> str:
    return "documents" if manifest.row_tokens is None else "examples"
