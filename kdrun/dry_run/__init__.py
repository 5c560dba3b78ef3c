"""``kdrun --dry-run``: what a run would do and need, from configurations and rows alone."""
