"""What a config can say of the sizes of groups: fields, ties, and groups that it cannot size."""

from fractions import Fraction
from itertools import islice, product
from typing import Any

from torch import nn

from wspace.errors import PruneError
from wspace.prune.huggingface.build import has_config, observer_of
from wspace.prune.huggingface.fields import named, probed
from wspace.space import WeightSpace
from wspace.trace import polynomials
from wspace.trace.polynomials import Polynomial
from wspace.trace.sizes import Sizes, find_sizes


def config_fields(
    module: nn.Module, space: WeightSpace, sizes: Sizes | None = None
) -> dict[str, list[tuple[str, int]]]:
    """Which fields of a config size which dimensions, found by building the class anew.

    Args:
        module: A Hugging Face model of the space; its weights are not used.
        space: Its weight space.
        sizes: Numbers in its code, where they are known already; otherwise they are found on the
            inputs that the space was traced with.

    Returns:
        Field, as ``text_config.hidden_size`` or ``hidden_sizes[2]`` → tensors and dimensions.
        Fields that the config leaves open but the constructor asks for are there too.

    Raises:
        PruneError: If the module is no Hugging Face model, or its class cannot be built from its
            config.

    Example:
        >>> import torch, wspace
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=12, n_layer=1, n_head=3, n_positions=8, vocab_size=9)
        >>> gpt2 = GPT2LMHeadModel(config).eval()
        >>> space = wspace.trace(gpt2, torch.arange(4)[None], {"use_cache": False})
        >>> config_fields(gpt2, space)["n_inner"][0]
        ('transformer.h.0.mlp.c_fc.weight', 1)
    """
    fields = probed(observer_of(module, space, sizes), module, explicit=True)
    return {
        named(f): [(o.name, o.dim) for o in seen if o.dim >= 0]
        for f, seen in fields.sized.items()
        if any(o.dim >= 0 for o in seen)
    }


def config_ties(
    module: nn.Module, space: WeightSpace, sizes: Sizes | None = None
) -> list[list[str]]:
    """Sets of groups that the config holds to one size: all layers' neurons by one number.

    Args:
        module: A Hugging Face model of the space; its weights are not used.
        space: Its weight space.
        sizes: See `config_fields`.

    Returns:
        Names of groups that must keep as many units as each other, in order of appearance. A model
        whose class cannot be built from its config has none.

    Raises:
        PruneError: If the module is no Hugging Face model.
    """  # noqa: DOC502 (observer_of raises)
    return _limits(module, space, sizes)[0]


def config_pinned(
    module: nn.Module, space: WeightSpace, sizes: Sizes | None = None
) -> dict[str, str]:
    """Groups that the config cannot make smaller on their own, and why.

    Some can together: where the width of an attention head is the hidden size by the number of
    heads, the three of them may change if the one stays the product of the others.

    Args:
        module: A Hugging Face model of the space; its weights are not used.
        space: Its weight space.
        sizes: See `config_fields`.

    Returns:
        Group → reason.

    Raises:
        PruneError: If the module is no Hugging Face model.
    """  # noqa: DOC502 (observer_of raises)
    return _limits(module, space, sizes)[1]


# ------------------------------------------------------------------------ limits of a config


def _limits(
    module: nn.Module, space: WeightSpace, sizes: Sizes | None
) -> tuple[list[list[str]], dict[str, str]]:
    """Groups that the config ties, and groups that it cannot size on their own."""
    if sizes is None and space.example is not None:
        sizes = find_sizes(space, module, *space.example)
    try:
        fields = probed(observer_of(module, space, sizes), module, explicit=True)
    except PruneError as error:
        if not has_config(module):
            raise
        return [], dict.fromkeys(space.groups, str(error).partition("\n")[0])
    ties = _Ties(space, sizes.ties() if sizes else [])
    alike: dict[Any, list[tuple[Polynomial, str]]] = {}
    for o, by in fields.responses.items():
        now = Fraction(fields.observed[o])
        relative = frozenset(
            (f, r.kind, r.slope / now if r.kind == "plus" else None) for f, r in by.items()
        )
        form = {k: c / now for k, c in fields.sizes[o].items()}
        names = ", ".join(named(f) for f in by)
        alike.setdefault(relative, []).append((form, f"{names} sizes {o} too"))
    for o, form in fields.sizes.items():
        if o not in fields.responses and o.dim > -2:
            now = Fraction(fields.observed[o])
            fixed = ({(): Fraction(1)}, "")
            own = {k: c / now for k, c in form.items()}
            alike[o] = [fixed, (own, f"no field sizes {o}")]
    ties.settle(list(alike.values()))
    return ties.sets(), ties.pinned


class _Ties:
    """Which groups are of one size if polynomials stay equal, and which cannot change for it."""

    def __init__(self, space: WeightSpace, tied: list[list[str]]) -> None:
        self.space = space
        self.size = {n: g.size for n, g in space.all_groups.items()}
        self.alias: dict[str, str] = {}
        self.pinned: dict[str, str] = {}
        for together in tied:
            for g in together[1:]:
                self._join(together[0], g)

    def settle(self, alike: list[list[tuple[Polynomial, str]]]) -> None:
        """Takes polynomials, of each list equal, until nothing more follows.

        Args:
            alike: Lists of polynomials with what is said where they cannot stay equal.
        """
        alike = sorted(alike, key=lambda forms: max(len(k) for f, _ in forms for k in (*f, ())))
        before = -1
        while before != len(self.alias):
            before = len(self.alias)
            for forms in alike:
                self._classes(forms)
        for forms in alike:
            for a, b in islice(product(self._classes(forms), repeat=2), 64):
                self._pin(a, b)

    def sets(self) -> list[list[str]]:
        """Sets of groups of one size."""
        found: dict[str, list[str]] = {}
        for g in self.space.groups:
            found.setdefault(self._root(g), []).append(g)
        return [s for s in found.values() if len(s) > 1]

    def _classes(self, forms: list[tuple[Polynomial, str]]) -> list[tuple[Polynomial, str]]:
        """One polynomial of every kind; those of a kind are made equal."""
        kinds: list[tuple[Polynomial, str]] = []
        for form, why in forms:
            now = polynomials.renamed(form, {g: self._root(g) for g in self.size})
            for kind, _ in kinds:
                pairs = self._paired(kind, now)
                if pairs is not None:
                    for g, h in pairs:
                        self._join(g, h)
                    break
            else:
                kinds.append((now, why))
        return kinds

    def _paired(self, a: Polynomial, b: Polynomial) -> list[tuple[str, str]] | None:
        """Pairs of groups that must be of one size; factors of every term are equal already."""
        terms = [*(k for k in a if a[k] != b.get(k)), *(k for k in b if b[k] != a.get(k))]
        for g in dict.fromkeys(terms[0] if terms else ()):
            if all(g in k for k in terms):
                left, right = (
                    polynomials.over(
                        {k: c for k, c in x.items() if k in terms}, {(g,): Fraction(1)}
                    )
                    for x in (a, b)
                )
                return self._paired(left or {}, right or {})
        return polynomials.paired(a, b, self.size)

    def _pin(self, a: tuple[Polynomial, str], b: tuple[Polynomial, str]) -> None:
        left = polynomials.plus(a[0], b[0], -1)
        shared = set.intersection(*(set(k) for k in left)) if left else set[str]()
        for g in {g for k in left for g in k} - shared:
            for h in self.space.groups:
                if self._root(h) == g:
                    self.pinned.setdefault(h, b[1] or a[1])

    def _root(self, g: str) -> str:
        while g in self.alias:
            g = self.alias[g]
        return g

    def _join(self, g: str, h: str) -> None:
        g, h = self._root(g), self._root(h)
        if g != h:
            self.alias[h] = g
