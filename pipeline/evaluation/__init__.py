"""Scores trained heads: logits, metrics, and the tables that the report reads."""
