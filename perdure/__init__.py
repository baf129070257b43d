"""Continual learning for language models and any `nn.Module`."""
