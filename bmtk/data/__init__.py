"""From text on disk or on the Hub to the batches of any training step.

    corpus_files -> sources -> tokenizers -> shards -> token_store -> packing -> shuffle -> batches

A module imports only those to its left and `rows`, what batches are made of; none knows a model, a task or a device.
"""
