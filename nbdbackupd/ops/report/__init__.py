"""A report on a host's backups, for people who answer for them."""
