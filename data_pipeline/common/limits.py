"""Limits of the data set format, checked before memory is allocated for sizes that a file claims.

docs/formats.md lists them. Writers keep within them, so that their output can be read.
"""

ID_BYTES = (2, 4)
MAX_FRAME_TOKENS = 1 << 24
MAX_FRAMES = 1 << 22
"""Maximum frames per shard."""
MAX_SHARD_TOKENS = 1 << 40
MAX_COUNTS = 1 << 25
"""Maximum numbers in a shard's document index: one per document, three per example."""
MAX_VOCABULARY = 1 << 21
MAX_HEADER_BYTES = 1 << 16
"""Maximum size of a shard's JSON header."""
MAX_MANIFEST_BYTES = 96 << 20
"""Size of a manifest of about 250,000 shards."""
MAX_SOURCE_CHARACTERS = 1 << 21
"""Maximum length of a command line: a manifest's description is searched for secrets."""
MAX_PLAN_BYTES = 512 << 20
"""Size of a plan of about two million files."""
MAX_RECORD_BYTES = 16 << 20
"""Maximum size of the completion record of a task or shard."""
MAX_DICTIONARY_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 32 << 20
