"""A run and what it keeps."""
