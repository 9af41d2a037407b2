"""Checkpoints in, checkpoints out: everything here reads and writes the one checkpoint folder of the project."""
