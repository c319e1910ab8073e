"""The trackers, which show metrics.jsonl: W&B, TensorBoard, trackio."""
