"""Load for a kvserve server: workloads, arrivals, a runner over the public client, reports, experiments."""
