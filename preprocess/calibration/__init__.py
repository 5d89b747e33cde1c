"""The pass over the batches: hooks, accumulators per site, checkpoints, resume, passes under a memory budget."""
