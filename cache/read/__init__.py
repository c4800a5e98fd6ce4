"""Reading: planning which bytes to read, and the local or remote files they come from."""
