"""Stage II: batches of cached rows, fused channels, stacks of classifiers."""
