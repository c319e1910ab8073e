"""How token rows travel to the ranks of their experts and back: four exchanges with the same numbers."""
