"""Triton kernels for what moves bytes in a layer. The code that they replace is their reference, and runs elsewhere."""
