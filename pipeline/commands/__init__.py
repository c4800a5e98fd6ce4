"""The command groups of `h2t`: parse, call, print."""
