"""The model that writes backwards, and how it learns."""

__version__ = "0.1.0"
