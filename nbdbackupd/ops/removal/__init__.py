"""How points leave a set: merged streams, one switch, what is freed."""
