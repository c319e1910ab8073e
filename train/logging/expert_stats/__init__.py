"""What the experts do while they train: numbers of every record, telemetry.jsonl, a probe of held-out rows, alarms."""
