"""The format: what a cache consists of, byte by byte, shared by both sides."""
