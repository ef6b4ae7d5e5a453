"""Planning: does a video fit into memory, and how long does it take."""
