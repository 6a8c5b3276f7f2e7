"""The server's configuration, resolved once: flags > ``KVSERVE_*`` environment > YAML file > defaults.

One table, :data:`SETTINGS`, names every setting; the command line, the environment's names, the keys of the
YAML file and the help text all follow from it. The name ``kv_memory`` is ``--kv-memory``,
``KVSERVE_KV_MEMORY`` and ``kv_memory:``. An unknown key or variable is an error that names it.
"""

from server.config.resolve import ConfigError, resolve
from server.config.resolved import ServerConfig
from server.config.settings import SETTINGS, Setting
from server.config.values import parse_bytes, parse_seconds

__all__ = ["SETTINGS", "ConfigError", "ServerConfig", "Setting", "parse_bytes", "parse_seconds", "resolve"]
