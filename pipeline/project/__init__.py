"""A project of one's own: what `h2t init` finds in the data, says about it and writes."""
