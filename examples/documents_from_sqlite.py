"""Documents of your own program as a source: here, a column of an SQLite table.

`python examples/documents_from_sqlite.py DATABASE 'SELECT body FROM posts' documents.jsonl.gz`

A source is files, so any program can make one: a line of JSON per document, with its text under
`text`. Other keys are ignored, except those named by options, such as `--language-column`.
Then `megaback tokenizer train --source documents.jsonl.gz …` and `megaback shards build …`.
"""

import argparse
import gzip
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path


def documents(database: Path, query: str) -> Iterator[str]:
    """One text per row, without holding the table in memory."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for (text,) in connection.execute(query):
            yield text


def write(database: Path, query: str, out: Path) -> int:
    """Number of documents written."""
    written = 0
    # The name has its final form only once the file is complete, so that no build reads a part.
    partial = out.with_name(f"{out.name}.partial")
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        for text in documents(database, query):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += 1
    partial.rename(out)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", type=Path)
    parser.add_argument("query")
    parser.add_argument("out", type=Path)
    print(write(**vars(parser.parse_args())), "documents")
