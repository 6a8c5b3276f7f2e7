"""What is cached, where, and for how long.

The core knows no gRPC, no asyncio, no torch, no threads and no wall clock.
"""
