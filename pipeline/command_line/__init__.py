"""The command line `h2t`: parse, call, print."""
