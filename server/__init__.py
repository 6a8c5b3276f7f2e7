"""The kvserve server: rpc in front, engine in a process of its own, worker at the model."""
