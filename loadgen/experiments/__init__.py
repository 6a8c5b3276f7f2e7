"""What `make bench` measures: the server beside its peers and its limits, in one run."""
