"""Masks that must not change without a sentence in the changelog."""
