"""How a weight space's symmetry group acts on states: sample, act, compose, inverse.

One convention, stated once: permutations *gather*. ``act(t, state)[i] = state[p[i]]``, hence
``act(compose(t, u), state) = act(t, act(u, state))`` with ``compose(p, q) = q[p]``.

A group that depends on others (``over``) has one permutation for each of their indices: a tensor
of shape ``(*sizes of over, size)`` read at the *output* indices. With ``p`` over heads and ``q``
within each head, ``out[h, d] = in[p[h], q[h, d]]``.

Diagonal factors multiply after the permutation: ``out[i] = s[i] ** exponent * in[p[i]]``.

A batched element holds one element for each row of a batch: its tensors have the same batch axes
in front, and a row of a state is moved by the element of that row. The batch is one more index
that everything depends on and that nothing moves, so the rules above say all.

The elements are in `transform`, how they move a state in `moving`, and positions along an axis of
products and concatenations in `places`.
"""

from wspace.action.moving import act as act
from wspace.action.moving import moved as moved
from wspace.action.places import along_axis as along_axis
from wspace.action.transform import KINDS as KINDS
from wspace.action.transform import State as State
from wspace.action.transform import Transform as Transform
from wspace.action.transform import compose as compose
from wspace.action.transform import identity as identity
from wspace.action.transform import inverse as inverse
from wspace.action.transform import sample as sample
from wspace.action.transform import shape_of as shape_of
