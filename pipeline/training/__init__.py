"""Stage I: the training loop and the formulas that losses share."""
