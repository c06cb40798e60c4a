"""What a timer starts: a backup as the configuration says, in its turn, noted and measured."""
