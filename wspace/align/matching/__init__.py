"""The transform that brings one state nearest to another: coordinate ascent over its groups.

`match` is the front; `ascent` holds the problem, `climb` the sweeps, `starts` where they begin; the
rest are steps for groups that need more than one assignment.
"""
