# What we use of python3-systemd.
