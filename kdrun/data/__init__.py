"""From files to padded batches: rows, tokens, held-out rows and the collator, around datasets."""
