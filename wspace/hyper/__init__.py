"""Hypernetworks: modules that generate the weights of any module."""
