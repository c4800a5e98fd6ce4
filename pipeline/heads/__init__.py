"""Stage II: batches of cached rows, fusion of channels, stacks of classifiers."""
