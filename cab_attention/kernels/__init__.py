"""Attention that also returns the cumulative score of every key."""
