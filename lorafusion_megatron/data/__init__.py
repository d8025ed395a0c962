"""Reading, chat templates, tokenizing and packed collation; no torch."""
