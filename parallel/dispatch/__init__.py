"""How token rows travel to the ranks of their experts and back: five exchanges with the same numbers."""
