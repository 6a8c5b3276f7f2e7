"""The gRPC front end: what stands between a client's bytes and an engine.

Nothing in here sees a tensor, a block or the prefix tree; nothing outside of here sees a protobuf message.
"""
