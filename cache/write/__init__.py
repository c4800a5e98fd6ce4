"""Writing: a cache is built in a staging directory and published by one rename."""
