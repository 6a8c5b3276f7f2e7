"""The Open Inference Protocol (Triton's gRPC service) in front of the same models as Predict."""
