"""What is fast, measured side by side with peers in one run. README.md says how to run and read it."""
