"""The page and the API of ``wan-mlx serve``, over a library's queue. Needs the extra ``serve``; never imports MLX."""
