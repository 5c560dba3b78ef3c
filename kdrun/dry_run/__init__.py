"""``kdrun --dry-run``: the steps and memory of a run, from configurations and rows alone."""
