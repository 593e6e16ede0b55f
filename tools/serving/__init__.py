"""Server of `megaback serve`: OpenAI's completions and megaback's own endpoints."""
