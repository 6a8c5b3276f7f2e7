"""API keys: who calls, with which scopes, and the salt that keeps tenants' caches apart.

A keys file is YAML: a list of entries with ``tenant``, ``scopes`` (``generate``, ``predict``, ``admin``;
default: generate alone) and either ``key`` or ``key_sha256`` (hexadecimal, so that the file need not hold the
key). Keys are compared as digests, in constant time and always with all of them.

Every method needs a key with its scope; of the Open Inference Protocol too, where even liveness tells what is
served. Probes ask ``grpc.health.v1``, which is open.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.rpc.call import ANONYMOUS, Caller
from server.rpc.errors import PermissionDenied, Unauthenticated

__all__ = ["ApiKey", "ApiKeyError", "Authenticator", "parse_api_keys"]

SCOPES = frozenset({"generate", "predict", "admin"})
MIN_KEY_CHARS = 16
_MAX_HEADER_CHARS = 4096
_SALT_PURPOSE = b"kvserve tenant salt v1"
_SCOPE_OF_SERVICE = {
    "kvserve.v1.CacheAdminService": "admin",
    "kvserve.v1.PredictService": "predict",
    "inference.GRPCInferenceService": "admin",
}
_SCOPE_OF_METHOD = {
    f"inference.GRPCInferenceService/{method}": "predict"
    for method in (
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelConfig",
        "ModelInfer",
        "ModelStreamInfer",
        "ModelStatistics",
        "RepositoryIndex",
    )
}
"""What else that service has (load, unload, shared memory, trace and log settings) is the administrator's."""


class ApiKeyError(ValueError):
    """A keys file that cannot be used; the text names the entry, never a key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, as its digest."""

    digest: bytes
    tenant: str
    scopes: frozenset[str]

    def __repr__(self) -> str:
        return f"ApiKey(tenant={self.tenant!r}, scopes={sorted(self.scopes)})"

    def caller(self) -> Caller:
        """Return who presents this key."""
        salt = hmac.new(self.digest, _SALT_PURPOSE, hashlib.sha256).hexdigest()
        return Caller(self.tenant, self.scopes, salt)


def parse_api_keys(entries: object) -> tuple[ApiKey, ...]:
    """Read the entries of a keys file, as YAML gave them. Raises :class:`ApiKeyError`."""
    if not isinstance(entries, list) or not entries:
        raise ApiKeyError("must be a list of entries with tenant, scopes and key or key_sha256")
    keys = [_parse_entry(index, entry) for index, entry in enumerate(entries)]
    if len({key.digest for key in keys}) < len(keys):
        raise ApiKeyError("the same key stands there twice")
    return tuple(keys)


def _parse_entry(index: int, entry: object) -> ApiKey:
    where = f"entry {index}"
    if not isinstance(entry, dict):
        raise ApiKeyError(f"{where}: not a mapping")
    unknown = set(map(str, entry)) - {"tenant", "scopes", "key", "key_sha256"}
    if unknown:
        raise ApiKeyError(f"{where}: unknown {', '.join(sorted(unknown))}")
    tenant = entry.get("tenant")
    if not isinstance(tenant, str) or not tenant or not tenant.isprintable() or len(tenant) > 128:
        raise ApiKeyError(f"{where}: tenant must be a printable name")
    scopes = entry.get("scopes", ["generate"])
    if not isinstance(scopes, list) or not scopes or not set(map(str, scopes)) <= SCOPES:
        raise ApiKeyError(f"{where}: scopes must be a list of {', '.join(sorted(SCOPES))}")
    key, digest_hex = entry.get("key"), entry.get("key_sha256")
    if (key is None) == (digest_hex is None):
        raise ApiKeyError(f"{where}: needs either key or key_sha256")
    if key is not None:
        if not isinstance(key, str) or len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable():
            raise ApiKeyError(
                f"{where}: key must be a text of at least {MIN_KEY_CHARS} printable ASCII characters"
            )
        digest = _digest(key)
    else:
        try:
            digest = bytes.fromhex(str(digest_hex))
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ApiKeyError(f"{where}: key_sha256 must be 64 hexadecimal digits")
    return ApiKey(digest, tenant, frozenset(map(str, scopes)))


class Authenticator:
    """Decides from metadata alone, before a message is read. Without keys, everybody is anonymous."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)
        self._callers = tuple(key.caller() for key in self._keys)
        self._tenants = {caller.salt: caller.tenant for caller in self._callers}

    def authenticate(self, metadata: Sequence[tuple[str, str | bytes]], method: str) -> Caller:
        """Return the caller of ``method`` (``/package.Service/Method``).

        Raises :class:`Unauthenticated`, or :class:`PermissionDenied` for a good key without the scope.
        """
        if not self._keys:
            return ANONYMOUS
        values = [value for name, value in metadata if name == "authorization"]
        if len(values) != 1:
            raise Unauthenticated("a single authorization header with a bearer key is required")
        caller = self._find(values[0])
        if caller is None:
            raise Unauthenticated("the key is not valid")
        scope = _scope_of(method)
        if scope not in caller.scopes:
            raise PermissionDenied(f"the key lacks the scope {scope}")
        return caller

    def tenant_of(self, salt: str) -> str:
        """Return whose cache a salt keeps apart; empty if nobody's who has a key."""
        return self._tenants.get(salt, "")

    def salts_of(self, tenant: str) -> frozenset[str]:
        """Return the salts of a tenant's keys, one for each; none if there is no such tenant."""
        return frozenset(caller.salt for caller in self._callers if caller.tenant == tenant)

    def _find(self, header: str | bytes) -> Caller | None:
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        scheme, _, token = text.partition(" ")
        if len(text) > _MAX_HEADER_CHARS or scheme.lower() != "bearer":
            return None
        digest = _digest(token.strip())
        found = None
        for key, caller in zip(self._keys, self._callers, strict=True):
            if hmac.compare_digest(key.digest, digest):
                found = caller
        return found


def _scope_of(method: str) -> str:
    name = method.strip("/")
    return _SCOPE_OF_METHOD.get(name) or _SCOPE_OF_SERVICE.get(name.partition("/")[0], "generate")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
