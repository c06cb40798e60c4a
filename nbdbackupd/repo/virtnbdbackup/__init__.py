"""Sets that virtnbdbackup wrote."""
