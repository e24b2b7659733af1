"""Recipes that build model zoos, and readers of published ones.

Owns what a zoo is made of, where it comes from and under which licence. Imports `wspace`; `wspace`
never imports it, and finds its recipes by the names in `RECIPES`.
"""

RECIPES = {
    "image_inrs": "datasets_zoo.inr:ImageINRs",
    "image_classifiers": "datasets_zoo.classifiers:ImageClassifiers",
    "language_models": "datasets_zoo.language:LanguageModels",
    "trajectories": "datasets_zoo.trajectories:Trajectories",
    "mixed_trajectories": "datasets_zoo.trajectories:Mixed",
    "unit_effects": "datasets_zoo.pruning:UnitEffects",
    "untrained": "datasets_zoo.untrained:Untrained",
    "published": "datasets_zoo.published.recipe:Published",
}
"""Short names of recipes: ``wspace zoo build image_inrs …``."""
