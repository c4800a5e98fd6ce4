"""What the stage `extract` is made of: forward passes, workers, rows that are kept; and why a cache is stale."""
