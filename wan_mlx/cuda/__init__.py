"""All that only an NVIDIA GPU needs."""
