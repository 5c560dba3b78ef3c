"""Teacher caches: what a teacher says about rows, kept on disk, in place of the teacher."""
