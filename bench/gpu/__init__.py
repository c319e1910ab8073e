"""`make gpu`: tests and measures this code on a machine with GPUs within minutes, in parts that do not stop each other."""
