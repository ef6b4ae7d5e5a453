"""Names of published models, and their download."""
