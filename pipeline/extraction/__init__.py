"""The parts of stage `extract`: batch-norm statistics, forward passes, cluster workers and reuse of earlier rows."""
