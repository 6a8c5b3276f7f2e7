"""Reuse of expensive intermediate computation, with its risk measured and bounded.

Two kinds: encodings of a slow encoder over rows of features (``build_feature_model``), and responses to
similar texts (``SemanticModel``). NumPy alone; a clock is passed in; nothing here knows of processes or RPC.
"""

from server.predict.reuse.build import build_feature_model
from server.predict.reuse.predictor import Certificate, Encoder, Head, LipschitzCertificate, Predictor
from server.predict.reuse.registry import register_predictor
from server.predict.reuse.semantic import SemanticModel

__all__ = [
    "Certificate",
    "Encoder",
    "Head",
    "LipschitzCertificate",
    "Predictor",
    "SemanticModel",
    "build_feature_model",
    "register_predictor",
]
