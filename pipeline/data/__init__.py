"""Datasets: images, the sample table, and the facts about classes."""
