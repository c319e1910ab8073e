"""What a run would do, found out without its devices."""
