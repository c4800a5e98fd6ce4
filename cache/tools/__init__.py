"""Whole-cache work: verify, statistics, pooled copies."""
