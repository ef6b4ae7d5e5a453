"""Reading and writing images and videos, previews, sanity checks."""
