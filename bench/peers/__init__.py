"""One training step of the same transformer, by tokenyard, by others, and dense: each side in a process of its own, taking turns."""
