"""`python -m megaback` is the `megaback` command."""

from megaback.cli import main

main(prog_name="megaback")
