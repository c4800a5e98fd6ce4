"""The cache format, byte by byte; used by the reader and the writer."""
