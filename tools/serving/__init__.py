"""What `megaback serve` is made of."""
