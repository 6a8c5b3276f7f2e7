"""Scheduling: which tokens of which request are computed next. Never sees a tensor."""
