"""Messages and services of kvserve.v1, generated from protos/; part of the public contract."""
