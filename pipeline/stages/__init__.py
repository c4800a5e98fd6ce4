"""The stages of dvc.yaml, one file each: its parameters, then `run`, read from top to bottom."""
