"""The configuration of a run: its sections, how they are loaded, how they are shown."""
