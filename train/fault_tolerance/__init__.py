"""Keeps a run alive, or ends it in good order: step guard, signals, replicas, stragglers, the hang guard, the dry step."""
