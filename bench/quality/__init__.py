"""Compares dense models with MoE variants of equal active size, trained on the same tokens."""
