"""The limits of the format of data sets, checked before memory is taken for what a file claims.

docs/formats.md states them. A writer keeps within them, so that what is written can be read.
"""

ID_BYTES = (2, 4)
MAX_FRAME_TOKENS = 1 << 24
MAX_FRAMES = 1 << 22
"""Frames of a shard."""
MAX_SHARD_TOKENS = 1 << 40
MAX_COUNTS = 1 << 25
"""Numbers in the document index of a shard: one for each document, three for each example."""
MAX_VOCABULARY = 1 << 21
MAX_HEADER_BYTES = 1 << 16
"""The JSON header of a shard."""
MAX_MANIFEST_BYTES = 96 << 20
"""About 250,000 shards."""
MAX_SOURCE_CHARACTERS = 1 << 21
"""As long as a command line may be: a manifest's description is searched for secrets."""
MAX_PLAN_BYTES = 512 << 20
"""About two million files."""
MAX_RECORD_BYTES = 16 << 20
"""The completion record of a task or of a shard."""
MAX_DICTIONARY_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 32 << 20
