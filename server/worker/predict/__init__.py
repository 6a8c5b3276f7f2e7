"""Text models for Predict: loaded from a checked local folder, never running anything of it."""

from server.worker.predict.loading import load_text_model, text_model_bytes

__all__ = ["load_text_model", "text_model_bytes"]
