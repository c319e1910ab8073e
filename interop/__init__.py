"""Hugging Face folders in and out, and upcycling."""
