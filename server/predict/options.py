"""What the predict process is started with. msgspec structs: they travel over the link, and read from YAML.

A catalogue file is a YAML mapping with a list ``models``; each entry is a :class:`ModelSpec`::

    models:
      - name: minilm
        source: minilm                     # a folder below the model root
        preload: true
      - name: sentiment
        version: "2"
        source: hf:owner/name@0123456789abcdef0123456789abcdef01234567
        canary: 0.1                        # 10% of the calls that name no version
      - name: churn
        source: models:/churn/3            # MLflow
      - name: risk
        features: {prefix: 24, lifetime_s: 60, budget: {max_changed: 0.01}}
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

__all__ = [
    "DTYPES",
    "EXECUTORS",
    "POOLINGS",
    "TASKS",
    "BudgetSpec",
    "CanarySpec",
    "FeatureSpec",
    "ModelSpec",
    "PredictOptions",
    "SemanticSpec",
    "is_plain_name",
]

TASKS = ("classify", "classify_tokens", "regress", "embed")
POOLINGS = ("mean", "cls", "last")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXECUTORS = ("auto", "native", "transformers")
PLAIN_NAME_TEXT = "1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or digit"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# What the link can carry, in 64 bits.
Size = Annotated[int, msgspec.Meta(le=2**63 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


def is_plain_name(name: str) -> bool:
    """Say whether this can be a model's name, a version or an alias: no separator, no way up."""
    return _PLAIN_NAME.fullmatch(name) is not None and ".." not in name and not name.endswith(".")


class BudgetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much reuse may cost; as ``kvcore.risk.RiskBudget``. None: that measure is not limited."""

    max_changed: float | None = 0.01
    max_cosine_distance: float | None = None
    max_l2: float | None = None


class CanarySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A reuse policy for a share of the traffic; what is None is as in the main one."""

    name: str
    share: float
    """0 < share < 1 of the rows, by a hash of the row's key features: a key stays with its policy."""
    prefix: int | None = None
    bin_width: float | None = None
    lifetime_s: float | None = None
    budget: BudgetSpec | None = None
    max_error: float | None = None


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A stateful encoder: an encoder and a head over rows of features, and how encodings are reused."""

    predictor: str = "builtin"
    """"builtin", or the name under which an encoder and head are registered (entry point group
    ``kvserve.predictors``)."""
    prefix: int = 24
    """K: the key is the first K features of a row; the encoder's output is reused for rows that share it."""
    bin_width: float = 0.0
    """Features of the key are rounded to multiples of it; 0: exact."""
    max_entries: Size = 100_000
    max_bytes: Size = 256 << 20
    """For the entries of each policy; whichever of the two is less."""
    lifetime_s: float | None = 60.0
    """TTL of an encoding; None: none. It adapts between the two below."""
    min_lifetime_s: float = 1.0
    max_lifetime_s: float = 3600.0
    budget: BudgetSpec = BudgetSpec()
    sample_share: float = 0.05
    """Share of the hits that are compared with a fresh encoding."""
    max_error: float | None = None
    """With a number: reuse only where the certificate bounds the prediction's error by it."""
    canaries: tuple[CanarySpec, ...] = ()
    seed: Seed = 0


class SemanticSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A semantic response cache over a model of texts: off unless it is configured."""

    embedder: str
    """Name of the served model with the task "embed" that says how similar texts are."""
    max_error_rate: float = 0.01
    """Share of reused responses that may be other than the fresh ones; the threshold is set to hold it."""
    max_entries: Size = 10_000
    lifetime_s: float | None = 3600.0
    sample_share: float = 0.05
    seed: Seed = 0


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One version of one model of the catalogue. Exactly one of ``source`` and ``features`` is given."""

    name: str
    version: str = "1"
    source: str | None = None
    """A folder below the model root (or, from the operator's own flags and files, any folder by an absolute
    path), "hf:owner/name@commit", or "models:/name/version"."""
    features: FeatureSpec | None = None
    task: str | None = None
    """"classify", "classify_tokens", "regress" or "embed"; None: by the model's own configuration."""
    pooling: str | None = None
    """"mean", "cls" or "last" (embed); None: by the model's own configuration, else mean."""
    normalize: bool | None = None
    max_length: int | None = None
    dtype: str = "auto"
    executor: str = "auto"
    """"auto", "native" or "transformers"."""
    preload: bool = False
    canary: float | None = None
    """This version is the alias "canary" and gets so much of the traffic."""
    sha256: dict[str, str] | None = None
    """File name to hexadecimal digest: checked at load, files that it does not name are refused."""
    semantic: SemanticSpec | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError``, naming the model and the field."""
        if not is_plain_name(self.name) or not is_plain_name(self.version):
            raise ValueError(f"model {self.name[:64]!r}: names and versions are {PLAIN_NAME_TEXT}")
        where = f"model {self.name!r} version {self.version!r}"
        if (self.source is None) == (self.features is None):
            raise ValueError(f"{where}: needs either source or features")
        if self.source is not None and not self.source.strip():
            raise ValueError(f"{where}: source must not be empty")
        if self.features is not None and (self.task or self.pooling or self.semantic):
            raise ValueError(f"{where}: task, pooling and semantic are not for features")
        for field, value, known in (
            ("task", self.task, TASKS),
            ("pooling", self.pooling, POOLINGS),
            ("dtype", self.dtype, DTYPES),
            ("executor", self.executor, EXECUTORS),
        ):
            if value is not None and value not in known:
                raise ValueError(f"{where}: {field} must be {', '.join(known[:-1])} or {known[-1]}")
        if self.canary is not None and not 0 <= self.canary <= 1:
            raise ValueError(f"{where}: canary must be between 0 and 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"{where}: max_length must be at least 1")


class PredictOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides how the predict process runs."""

    models: tuple[ModelSpec, ...] = ()
    model_root: str | None = None
    """Folders below it (``name/`` or ``name/version/``) are the catalogue, beside ``models``; sources given
    over RPC must lie below it."""
    memory_bytes: int | None = None
    """For loaded models; None: half of what is free at the start."""
    max_models: int | None = None
    mlflow_uri: str | None = None
    download_folder: str | None = None
    """Where models fetched from MLflow are kept; None: below the user's ``~/.cache``."""
    download_bytes: int = 64 << 30
    """Budget of that folder."""
    device: str = "auto"
    num_threads: int | None = None
    """None: one less than the cores that the process may use."""
    max_batch_tokens: int = 8192
    max_delay_s: float = 0.002
    """The most that a batch is ever held back for more to come; 0: never."""
    max_waiting_tokens: int = 1 << 20
    """Tokens (rows) that may wait; more are refused."""
    max_inputs: int = 4096
    """Inputs of one call."""
