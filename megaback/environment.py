"""Environment variables by which the launcher tells a rank where it is."""

LAUNCHER_VARIABLE = "MEGABACK_LAUNCHER"
"""The process that started this rank, and that it is not to outlive."""


HOST_VARIABLE = "MEGABACK_HOST"
"""Name of this node in the hostfile."""
