"""The built-in losses, one file each. They are found through entry points, like any plugin's."""
