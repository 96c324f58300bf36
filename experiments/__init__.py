"""Experiments: one script reproduces one figure or table."""
