"""Runs the step of a rank without its device."""
