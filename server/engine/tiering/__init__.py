"""Blocks between the device and the tiers: what goes down, what comes up, and when."""
