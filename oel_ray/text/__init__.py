"""Write prompts, and turn them into token ids with a chat format."""
