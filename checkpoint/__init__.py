"""Sharded checkpoints in safetensors and JSON, that open on any layout. `store` is the face of it."""
