"""Predict: many models in bounded memory, batches over all callers, reuse with its risk measured."""
