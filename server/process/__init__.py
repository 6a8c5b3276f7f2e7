"""A process of its own behind a socket pair: frames, links, life and death. Whatever is said over it."""
