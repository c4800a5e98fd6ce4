"""Images, the sample table and class facts: what datasets are made of."""
