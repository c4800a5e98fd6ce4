"""From what `evaluate` wrote to tables, pictures and the page."""
