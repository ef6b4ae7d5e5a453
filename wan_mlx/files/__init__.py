"""Containers of weights; they know no network."""
