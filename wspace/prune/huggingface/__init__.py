"""Hugging Face models made anew from a smaller config: which field sizes what, and solved for."""
