"""Graph hypernetworks: parameters of architectures that were never seen, from their graphs."""
