"""Model zoos: many trained networks, their hyperparameters and labels, in one folder.

A `Recipe` makes cohorts of networks; `build` writes them, a shard for each, and can be killed and
resumed at any point; `open` reads them by memory map.
"""

from wspace.zoo.architecture import Architecture as Architecture
from wspace.zoo.architecture import InputSpec as InputSpec
from wspace.zoo.architecture import example_network as example_network
from wspace.zoo.batch import ZooBatch as ZooBatch
from wspace.zoo.build import build as build
from wspace.zoo.collection import Zoo as Zoo
from wspace.zoo.opening import open_zoo as open_zoo
from wspace.zoo.recipe import Cohort as Cohort
from wspace.zoo.recipe import Column as Column
from wspace.zoo.recipe import Counted as Counted
from wspace.zoo.recipe import Recipe as Recipe
from wspace.zoo.recipe import generator_of as generator_of
from wspace.zoo.recipe import recipe_from as recipe_from
from wspace.zoo.recipe import recipe_names as recipe_names
from wspace.zoo.split import Split as Split

open = open_zoo
