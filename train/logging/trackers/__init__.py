"""Where numbers go beside metrics.jsonl: W&B, TensorBoard, trackio."""
