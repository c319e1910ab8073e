"""Rows of text that are read while training: the same sequence on every layout, from any point on."""
