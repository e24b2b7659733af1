"""Cells whose weights change while they run: HyperLSTM, self-referential and delta-rule cells."""
