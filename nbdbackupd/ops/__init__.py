"""One verb each: a typed request in, a typed report out."""
