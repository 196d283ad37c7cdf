"""From text on disk or on the Hub to the batches of any training step.

    sources -> tokenizers -> token_store -> packing -> order -> batches

Each module stands alone but for the ones to its left; nothing here knows a model, a task or a device.
"""
