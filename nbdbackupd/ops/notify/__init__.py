"""Whom the end of a unit is told, and how it gets there."""
