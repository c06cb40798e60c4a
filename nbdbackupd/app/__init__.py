"""The border to people and services: arguments, output, exit codes, signals."""
