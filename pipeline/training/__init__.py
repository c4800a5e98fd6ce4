"""Stage I: the training loop, the base class of objectives, and formulas that losses share."""
