"""Single files of a restore point."""
