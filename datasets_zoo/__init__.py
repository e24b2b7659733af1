"""Recipes that build model zoos, and readers of published ones.

Owns what a zoo is made of, where it comes from and under which licence. Imports `wspace`; `wspace`
never imports it.
"""
