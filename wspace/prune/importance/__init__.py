"""How much each unit matters: from weights alone, from data, and made sparse in training."""
