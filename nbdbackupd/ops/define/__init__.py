"""A domain made of what was restored."""
