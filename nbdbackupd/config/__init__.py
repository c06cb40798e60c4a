"""The configuration in ``/etc/nbdbackup``: its schema, its files, what it says for a domain."""
