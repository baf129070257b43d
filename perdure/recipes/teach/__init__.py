"""Teaching a model in a conversation."""
