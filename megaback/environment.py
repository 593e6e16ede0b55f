"""Environment variables that the launcher sets for a rank."""

LAUNCHER_VARIABLE = "MEGABACK_LAUNCHER"
"""Process id of the launcher; a rank ends when that process does."""


HOST_VARIABLE = "MEGABACK_HOST"
"""Name of this node in the hostfile."""
