"""What systemd is told and asked: readiness, delay of a shutdown, units."""
