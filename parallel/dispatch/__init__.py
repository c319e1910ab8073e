"""How token rows travel to the ranks of their experts and back: six exchanges with the same numbers."""
