"""Measurements that print a table or JSON."""
