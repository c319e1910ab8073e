"""`tokenyard parity`: one model on many layouts, the same numbers or a named difference."""
