"""What a configuration must obey, checked before any process group exists."""
