"""One training step of the same transformer, by tokenyard, by others, and dense: each side in its own process, taking turns."""
