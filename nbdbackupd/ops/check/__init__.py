"""Whether the next backup of a domain will work."""
