"""One run that saves a domain, and what it decides on the way."""
