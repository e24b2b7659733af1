"""Lightning modules of hypernetworks: one for each system of `docs/hypernetworks`."""
