"""The body of scripts/bench: what is measured, with what, on which data."""
