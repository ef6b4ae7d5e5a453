"""Prompts: extension by a language model, and a cache of their embeddings."""
