"""Networks up to their last feature maps, the classifiers on top of them, and their weights in and out of files."""
