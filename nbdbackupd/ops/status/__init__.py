"""What happened, and how well domains are protected."""
