"""Teacher caches: the outputs of a teacher, stored on disk and used instead of the teacher."""
