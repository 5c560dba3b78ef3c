"""From files to padded batches: rows, examples, the held-out split and the collator."""
