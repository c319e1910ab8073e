"""The model, written for one device. Every part is usable on its own; nothing here knows of ranks."""
