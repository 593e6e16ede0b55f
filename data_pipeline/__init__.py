"""Documents to shards to order. This package never imports torch."""
