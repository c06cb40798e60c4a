"""Backup sets on disk: layout, drafts, publishing, locks."""
