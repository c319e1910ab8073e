"""What keeps a run alive, or ends it in good order: flags, guards, checks of replicas, accounting of time."""
