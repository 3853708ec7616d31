"""Training data: conversation records, mixtures and the synthetic video world."""
