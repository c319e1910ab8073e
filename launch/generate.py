"""`tokenyard generate`: text from a checkpoint, on one device."""
