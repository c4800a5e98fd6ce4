"""Reading: plans of byte ranges, and the local or remote files they are read from."""
