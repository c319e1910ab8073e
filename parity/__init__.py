"""`tokenyard parity`: trains one model on many layouts and checks that the numbers are the same."""
