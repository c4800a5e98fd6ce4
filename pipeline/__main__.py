"""`python -m pipeline` is `h2t`."""

from pipeline.cli import main

main()
