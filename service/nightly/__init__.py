"""The nightly run: one measured night, read beside the nights before it, summed up, told, and turned into an exit code."""
