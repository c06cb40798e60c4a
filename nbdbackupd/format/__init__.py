"""Bytes on disk and the values they stand for; ``docs/format.md`` is the specification."""
