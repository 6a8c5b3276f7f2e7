"""Objects in Redis, shared by several servers."""

from kvcore.tiers.redis.tier import RedisOptions, RedisTier

__all__ = ["RedisOptions", "RedisTier"]
