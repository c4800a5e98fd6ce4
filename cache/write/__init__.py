"""Writing: a cache grows in a staging directory and appears by one rename."""
