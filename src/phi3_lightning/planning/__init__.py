"""What a run will need, predicted from its configuration: memory, time, and what would help."""
