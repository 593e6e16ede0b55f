"""Sources to shards, and shards to batches. This package never imports torch."""
