"""The console output of a run: the start, a line a step, the table of layers, the summary."""
