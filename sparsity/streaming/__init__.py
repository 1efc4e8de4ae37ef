"""Pruning from disk to disk: one block of the model in memory at a time, and every block an atomic step.

``model_on_disk`` loads and frees the parts of a model, ``journal`` remembers what is finished, ``hidden_states`` holds
what flows between the blocks, ``output`` writes the folder, and ``stream`` is the call.
"""
