"""EAGLE-3 draft heads (arXiv:2503.01840): the module, for drafting and for training."""
