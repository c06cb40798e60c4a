"""A domain as it is now: finding it, looking at its disks, opening them."""
