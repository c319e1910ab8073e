"""What people, files and trackers are told of a run."""
