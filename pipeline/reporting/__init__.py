"""From the results of `evaluate` to tables, figures and the page."""
