"""API keys: what they look like, where they are kept, who they belong to, and what their holders used."""
