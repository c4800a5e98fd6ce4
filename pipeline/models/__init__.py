"""A head given back: merged with its backbone into one file, exported, used on new images."""
