"""Objects in Redis, shared by several servers."""

from kvcore.tiers.redis.options import RedisOptions
from kvcore.tiers.redis.tier import RedisTier

__all__ = ["RedisOptions", "RedisTier"]
