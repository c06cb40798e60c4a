"""Retention: which points stay, and why; prune, protect, unprotect."""
