"""One training step of the same transformer by tokenyard, by other systems, and dense; each side in its own process."""
