"""Tests of nbdbackupd and the lab they run in."""
