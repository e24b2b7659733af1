"""Recipes that build model zoos, and readers of published ones.

Owns what a zoo is made of, where it comes from and under which licence. Imports `wspace`; `wspace`
never imports it, and finds its recipes by the names in `RECIPES`.
"""

RECIPES = {
    "image_inrs": "datasets_zoo.inr:ImageINRs",
    "image_classifiers": "datasets_zoo.classifiers:ImageClassifiers",
}
"""Short names of recipes: ``wspace zoo build image_inrs …``."""
