"""`python -m pipeline` is `h2t`."""

from pipeline.cli import main

if __name__ == "__main__":  # worker processes import this module too
    main()
