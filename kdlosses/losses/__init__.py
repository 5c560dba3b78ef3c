"""The built-in losses, one file each, registered through entry points like plugins."""
