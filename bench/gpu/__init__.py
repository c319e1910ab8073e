"""`make gpu`: all that a machine with GPUs can tell of this code within minutes, in parts that do not stop each other."""
