"""How batches become a checkpoint, exactly, on any number of devices; no task is known here by name."""
