"""A small run under faults, and the proof that it ends as one without: behind tools/soak.py."""
