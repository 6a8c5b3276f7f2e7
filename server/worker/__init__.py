"""The only home of model code: loading, KV memory, packing, attention, sampling. Never sees the tree."""
