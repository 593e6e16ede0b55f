"""Commands that use runs and checkpoints: export, generation, scoring, serving, inspection."""
