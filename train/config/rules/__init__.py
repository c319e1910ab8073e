"""The rules between settings, checked before torch is imported."""
