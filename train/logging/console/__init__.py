"""What a run prints: a line a step, the table of layers, start and end."""
