"""Matching, merging and comparing networks up to their symmetries."""

from wspace.align.match import Matching as Matching
from wspace.align.match import match as match
from wspace.align.match import match_many as match_many
from wspace.align.match import objective as objective
