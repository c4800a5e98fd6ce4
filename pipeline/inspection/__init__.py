"""What is right or wrong here: parameters checked, caches explained and recomputed, the doctor."""
