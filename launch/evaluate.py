"""`tokenyard evaluate`: the validation loss of a checkpoint."""
