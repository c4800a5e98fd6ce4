"""From trained heads to figures: scores, metrics, tables and what the report shows beside them."""
