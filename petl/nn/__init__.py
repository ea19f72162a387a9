"""Parts that several methods share; nothing here knows a backbone."""
