"""H2T on cached feature maps: `h2t.cache` reads and writes caches, `h2t.pipeline` is everything around them."""
