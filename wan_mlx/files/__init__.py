"""File formats of weights; independent of any network."""
