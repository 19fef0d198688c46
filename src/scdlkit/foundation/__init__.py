"""The engine: arrays and tensors in, arrays and tensors out."""
