"""Data of the experiments in `configs/hyper`, as Lightning data modules."""
