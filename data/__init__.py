"""From text on disk to global batches of token ids."""
