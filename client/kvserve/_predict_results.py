"""What predict calls return: frozen values of the client's own, so that user code never holds a protobuf.

::

    Prediction                  num_tokens, truncated, cache_hit
    |-- Classification          label, score, scores, labels
    |-- TokenClassification     tokens
    |-- Regression              values
    |-- Embedding               vector
    `-- FeaturePrediction       prediction
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar, cast, overload

from kvserve._errors import Error, FieldViolation, Internal, InvalidArgument

__all__ = [
    "Classification",
    "EmbedResult",
    "Embedding",
    "FeaturePrediction",
    "LabelScore",
    "PredictModelInfo",
    "PredictOutcome",
    "PredictResult",
    "PredictTask",
    "PredictTimings",
    "Prediction",
    "Regression",
    "TokenClassification",
    "TokenLabel",
]


class PredictTask(StrEnum):
    """What a predict model does."""

    CLASSIFY = "classify"
    CLASSIFY_TOKENS = "classify_tokens"
    REGRESS = "regress"
    EMBED = "embed"
    FEATURES = "features"
    OTHER = "other"
    """A task that this version of the client doesn't know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The answer to one input. Which of its kinds a model gives is the model's task."""

    num_tokens: int = 0
    """Tokens that the model read, added ones included; 0 for rows of features."""
    truncated: bool = False
    """The input was longer than the model's limit and was cut, as asked."""
    cache_hit: bool = False
    """Something was reused that was computed for another input."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and its probability, in 0..1."""

    label: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification(Prediction):
    """One text's label."""

    label: str
    """The likeliest one."""
    score: float
    scores: tuple[LabelScore, ...] = ()
    """The ``top_k`` likeliest labels; with ``top_k=0`` all, in the model's order."""
    labels: tuple[str, ...] = ()
    """Of a model whose labels don't exclude each other: those with a score of at least 0.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLabel:
    """One token's label."""

    label: str
    score: float
    start: int
    """Half-open range of the text, in characters."""
    end: int
    part: int = 0
    """0: in the text; 1: in its pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClassification(Prediction):
    """A label for each token of a text, those that the tokenizer adds apart."""

    tokens: tuple[TokenLabel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression(Prediction):
    """Numbers for a text."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Prediction):
    """A text's vector, as ``predict`` gives it; ``embed`` is the shorter way."""

    vector: array[float]
    """float32; ``numpy.asarray`` takes it without a copy, ``.tolist()`` gives plain floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePrediction(Prediction):
    """The answer to a row of features."""

    prediction: float
    """In 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictTimings:
    """Where the time went, in seconds, measured by the server.

    Of a list that took several calls: the longest wait of any for the model and in the queue, the sum of what
    was computed, the largest batch, and as ``total_s`` the time from the first call to the last answer.
    """

    load_s: float = 0.0
    """Waiting for the model to be loaded; 0 if it was there."""
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    """Of the batches that computed it."""
    total_s: float = 0.0
    batch_size: int = 0
    """Inputs in the largest of these batches, of all callers together."""
    batch_tokens: int = 0


AnyPrediction = TypeVar("AnyPrediction", bound=Prediction, covariant=True)
Expected = TypeVar("Expected", bound=Prediction)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictResult(Sequence[AnyPrediction], Generic[AnyPrediction]):
    """The predictions, as a sequence in the order of the inputs, and what answered."""

    predictions: tuple[AnyPrediction, ...]
    model: str
    version: str
    """The version that answered, whatever alias the call named."""
    policy: str = ""
    """Which reuse policy answered, several with commas between them; empty if nothing is reused."""
    request_id: str = ""
    timings: PredictTimings
    num_calls: int = 1
    """More than one where the list was too long for one call."""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the model read, over all inputs."""
        return sum(prediction.num_tokens for prediction in self.predictions)

    @property
    def num_truncated(self) -> int:
        """Return how many inputs were cut."""
        return sum(prediction.truncated for prediction in self.predictions)

    @property
    def num_cache_hits(self) -> int:
        """Return how many inputs were answered with something that was computed for another."""
        return sum(prediction.cache_hit for prediction in self.predictions)

    def expect(self, output: type[Expected]) -> PredictResult[Expected]:
        """Return this result as one of a certain kind of prediction, for type checkers too.

        Raises ``InvalidArgument`` if the model answered with another kind.
        """
        for prediction in self.predictions:
            if not isinstance(prediction, output):
                description = f"answers with {type(prediction).__name__}, not with {output.__name__}"
                raise InvalidArgument(
                    f"model: {description}", violations=[FieldViolation("model", description)]
                )
        return cast("PredictResult[Expected]", self)

    def __len__(self) -> int:
        return len(self.predictions)

    @overload
    def __getitem__(self, index: int) -> AnyPrediction: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AnyPrediction, ...]: ...
    def __getitem__(self, index: int | slice) -> AnyPrediction | tuple[AnyPrediction, ...]:
        return self.predictions[index]

    def __iter__(self) -> Iterator[AnyPrediction]:
        return iter(self.predictions)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult(Sequence["array[float]"]):
    """The vectors, as a sequence in the order of the inputs.

    Each is an ``array('f')``: float32, a buffer, so that ``numpy.asarray(result.vectors)`` is a matrix and
    ``result[0].tolist()`` a list of plain floats.
    """

    vectors: tuple[array[float], ...]
    model: str
    version: str
    request_id: str = ""
    num_tokens: int = 0
    """Over all inputs."""
    num_truncated: int = 0
    timings: PredictTimings
    num_calls: int = 1
    """More than one where the list was too long for one call."""

    @property
    def num_dimensions(self) -> int:
        """Return the length of each vector; 0 if there is none."""
        return len(self.vectors[0]) if self.vectors else 0

    def __len__(self) -> int:
        return len(self.vectors)

    @overload
    def __getitem__(self, index: int) -> array[float]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[array[float], ...]: ...
    def __getitem__(self, index: int | slice) -> array[float] | tuple[array[float], ...]:
        return self.vectors[index]

    def __iter__(self) -> Iterator[array[float]]:
        return iter(self.vectors)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOutcome:
    """What became of one request of a stream: its answer, or the error that a call of its own would raise."""

    request_id: str
    answer: PredictResult[Prediction] | None = None
    error: Error | None = None

    @property
    def result(self) -> PredictResult[Prediction]:
        """Return the answer. Raises the error if there is none."""
        if self.answer is None:
            raise self.error or Internal("the outcome is neither an answer nor an error")
        return self.answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictModelInfo:
    """What a predict model takes and gives. Of one that is not loaded only what its configuration says."""

    name: str
    version: str
    task: PredictTask | None
    """None: not known before it is loaded."""
    family: str
    """Architecture, for example "bert"; "features" for a stateful encoder."""
    labels: tuple[str, ...]
    """In the order of the scores."""
    multi_label: bool
    """Labels don't exclude each other."""
    num_dimensions: int
    """Of vectors, or of the numbers of a regression."""
    num_features: int
    """Of a row."""
    max_length: int
    """Longest input in tokens, added ones included; 0 for features."""
    pooling: str
    normalized: bool
    """Vectors have length 1."""
    fingerprint: str
    num_parameters: int
    num_bytes: int
    """Memory that it takes while loaded."""
    dtype: str
    device: str
    executor: str
    loaded: bool
    """False: it will be, on first use."""
    aliases: tuple[str, ...]
