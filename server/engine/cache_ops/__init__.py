"""Operations on an engine's cache, one small module for each kind; ``cache_desk`` puts them together."""
