"""The typed configuration: composed, checked and written back. No torch, and nothing else of train."""
