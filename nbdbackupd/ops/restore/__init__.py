"""The disks of a restore point, brought back."""
