"""Proof that a set holds what it says."""
