"""Statistics of the experts during training: metrics of each logged step, telemetry.jsonl, the probe, alerts."""
