"""A training run: configuration, session, step, checkpoints, logging, fault tolerance."""
