"""Complete classifiers: export from cache, heads and backbone; load; predict on images."""
