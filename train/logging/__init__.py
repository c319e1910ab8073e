"""Logs a run to files, trackers and the console."""
