"""The config that gives the sizes that are left: its fields solved from sizes of tensors."""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice, product
from math import prod
from typing import Any

from torch import nn

from wspace.errors import PruneError, message
from wspace.prune.huggingface.build import Observable, Observer, build_meta, observer_of, shapes_of
from wspace.prune.huggingface.fields import Field, Fields, Number, Response, named, probed
from wspace.prune.restriction import Restriction
from wspace.trace.sizes import Sizes

TRIES = 64
"""Combinations of field values that are tried where several fit what is known."""


def smaller_config(module: nn.Module, restriction: Restriction, sizes: Sizes | None = None) -> Any:
    """The config from which the class builds a model of the sizes that are left.

    Args:
        module: A Hugging Face model of the large space; its weights are not used.
        restriction: What is kept.
        sizes: See `config_fields`.

    Returns:
        A changed copy of the module's config. A model of it has exactly the tensors of the small
        space, by name, shape and tie.

    Raises:
        PruneError: If a field would need two values, or no values give the tensors that are left.
    """
    observer = observer_of(module, restriction.large, sizes)
    wrong: list[str] = []
    for explicit in (False, True):
        fields = probed(observer, module, explicit=explicit)
        if explicit and not fields.explicit:
            break
        targets = _targets(observer, fields, restriction)
        proposals, wrong = _solved(fields, targets)
        if wrong:
            continue
        for values in islice(proposals, TRIES):
            config = fields.changed({f: v for f, v in values.items() if v != fields.values[f]})
            wrong = _differences(observer, config, targets, restriction, type(module))
            if not wrong:
                return config
    raise PruneError(
        message(
            f"prune: the config of {type(module).__name__} cannot say these sizes",
            expected="one value for every field of the config, from which the class builds every "
            "tensor that is left",
            got=wrong[:12],
            help="keep as many units in groups that one field sizes (`config_ties`), leave groups "
            'that no field sizes as they are, or pass rebuild="copy"',
        )
    )


def _targets(observer: Observer, fields: Fields, few: Restriction) -> dict[Observable, int]:
    """What every observable has to be."""
    size = {n: g.size for n, g in few.small.all_groups.items()}
    free = set(few.large.groups)
    out: dict[Observable, int] = {}
    for o in fields.observed:
        form = observer.forms[o]
        value = sum((c * prod(size[g] for g in key) for key, c in form.items()), Fraction(0))
        now = sum(
            (c * prod(few.large.all_groups[g].size for g in key) for key, c in form.items()),
            Fraction(0),
        )
        if now == fields.observed[o] and all(g in free for key in form for g in key):
            out[o] = int(value)
    return out


# ------------------------------------------------------------------------------------ solving


def _solved(
    fields: Fields, targets: Mapping[Observable, int]
) -> tuple[Iterator[dict[Field, Number]], list[str]]:
    """Values of fields that fit: first what follows, then what is left to try; or why none do."""
    wrong = [
        f"{o} would be {targets[o]} instead of {fields.observed[o]}, which no field says"
        for o in targets
        if targets[o] != fields.observed[o] and not fields.responses.get(o) and o.dim > -2
    ]
    known: dict[Field, Number] = {}
    source: dict[Field, Observable] = {}
    while not wrong:
        votes = _votes(fields, targets, known)
        for f, by_value in votes.items():
            firm = {v: os for v, os in by_value.items() if any(o.dim > -2 for o in os)}
            if len(firm) > 1:
                first = [f"{v} for {_first(os)}" for v, os in firm.items()]
                wrong.append(f"{named(f)} would be {' and '.join(first)}")
            best = firm or by_value
            known[f] = max(best, key=lambda v: len(best[v]))
            source[f] = _first(best[known[f]])
        if not votes:
            break
    if not wrong:
        wrong = _contradicted(fields, targets, known, source)
    return _combined(fields, known, targets), wrong


Votes = dict[Field, dict[Number, list[Observable]]]


def _votes(
    fields: Fields, targets: Mapping[Observable, int], known: Mapping[Field, Number]
) -> Votes:
    """What follows for fields that are the only unknown one of an observable: value → which."""
    votes: Votes = {}
    for o, by in fields.responses.items():
        unknown = [f for f in by if f not in known]
        if o in targets and len(unknown) == 1:
            value = _value(fields, o, unknown[0], known, targets[o])
            if value is not None:
                votes.setdefault(unknown[0], {}).setdefault(value, []).append(o)
    return votes


def _contradicted(
    fields: Fields,
    targets: Mapping[Observable, int],
    known: Mapping[Field, Number],
    source: Mapping[Field, Observable],
) -> list[str]:
    """Tensors that would need another value of a field than follows from others."""
    wrong: dict[str, None] = {}
    for o, by in fields.responses.items():
        if o not in targets or o.dim == -2 or not all(f in known for f in by):
            continue
        values = {f: _value(fields, o, f, known, targets[o]) for f in by}
        other = [f for f, v in values.items() if v is not None and v != known[f]]
        if other and len(other) == len([v for v in values.values() if v is not None]):
            f = other[-1]
            wrong[f"{named(f)} would be {known[f]} for {source[f]} and {values[f]} for {o}"] = None
    return list(wrong)


def _first(seen: list[Observable]) -> Observable:
    """The observable to name: a tensor if there is one."""
    return next((o for o in seen if o.dim > -2), seen[0])


def _combined(
    fields: Fields,
    known: Mapping[Field, Number],
    targets: Mapping[Observable, int],
) -> Iterator[dict[Field, Number]]:
    """Combinations of values of the fields that do not follow from others, likely ones first."""
    yield dict(known)
    choices: dict[Field, list[Number]] = {}
    for o, by in fields.responses.items():
        for f in by:
            if f in known or o not in targets:
                continue
            now = fields.values[f]
            value = _value(fields, o, f, known, targets[o])
            found = choices.setdefault(f, [now])
            if value is not None and value not in found:
                found.append(value)
    if choices:
        for values in product(*choices.values()):
            yield {**known, **dict(zip(choices, values, strict=True))}


def _value(
    fields: Fields, o: Observable, f: Field, known: Mapping[Field, Number], target: int
) -> Number | None:
    """The value of a field that gives an observable, others known or as they are; None if none."""
    factor, extra = Fraction(1), Fraction(0)
    own: Response | None = None
    for g, r in fields.responses[o].items():
        if g == f:
            own = r
            continue
        now, new = fields.values[g], known.get(g, fields.values[g])
        if r.kind == "other" and new != now:
            return None
        if r.kind == "times":
            factor *= Fraction(new) / Fraction(now)
        elif r.kind == "over":
            factor *= Fraction(now) / Fraction(new)
        elif r.kind == "plus":
            extra += r.slope * (Fraction(new) - Fraction(now))
    base, v = fields.observed[o], Fraction(fields.values[f])
    if own is None:
        return None
    if own.kind == "plus":
        value = v + (target / factor - base - extra) / own.slope
    elif own.kind == "times":
        value = v * target / ((base + extra) * factor) if base + extra else Fraction(0)
    elif own.kind == "over":
        value = v * (base + extra) * factor / target if target else Fraction(0)
    else:
        value = v if target == base else Fraction(0)
    if isinstance(fields.values[f], float):
        return float(value) if value > 0 else None
    return int(value) if value.denominator == 1 and value > 0 else None


def _differences(
    observer: Observer,
    config: Any,
    targets: Mapping[Observable, int],
    few: Restriction,
    kind: type[nn.Module],
) -> list[str]:
    """What a build from a config has other than it should; empty if it is right."""
    try:
        config = type(config).from_dict(config.to_dict())  # as it will be read again
        module = build_meta(kind, config)
    except Exception as error:  # a config may be refused in any way
        return [f"{type(error).__name__}: {error} {error.__cause__ or ''}".strip()]
    found = shapes_of(module)
    wanted = {n: p.shape for p in few.small.params for n in (p.name, *p.ties)}
    wrong = [
        f"{n!r} {found.get(n, 'missing')}, expected {wanted.get(n, 'no such tensor')}"
        for n in dict.fromkeys((*wanted, *found))
        if found.get(n) != wanted.get(n)
    ]
    seen = {} if wrong else observer.observe_built(module)
    wrong += [
        f"{o} {seen[o]}, expected {targets[o]}"
        for o in seen
        if o.dim == -2 and o in targets and seen[o] != targets[o]
    ]
    tensors: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    for p in few.small.params:
        if not wrong and p.name in tensors:
            wrong += [
                f"{t!r} is not the tensor {p.name!r}"
                for t in p.ties
                if tensors.get(t) is not tensors[p.name]
            ]
    return wrong
