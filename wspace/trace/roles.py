"""The role of a parameter: how the operators that read it use it, never what it is called."""

from wspace.space import Role
from wspace.trace.program import Call, Program, Value

_CONTRACTIONS = frozenset(
    """
    mm addmm bmm baddbmm mv addmv dot linear convolution _trilinear _grouped_mm
    _scaled_dot_product_flash_attention_for_cpu
    """.split()
)
_VIEWS = frozenset(
    """
    t transpose permute view _unsafe_view expand unsqueeze squeeze select slice split
    split_with_sizes unbind clone _to_copy alias detach repeat _weight_norm_interface neg cat
    stack
    """.split()
)


def roles_of(program: Program) -> dict[int, Role]:
    """The role of each parameter, from the operators that read it or a view of it."""
    owner: dict[int, list[Value]] = {id(v): [v] for v in program.params}
    found: dict[int, set[Role]] = {}
    for call in program.calls:
        for i, value in enumerate(call.ins):
            for param in owner.get(id(value), ()):
                role = _role(call, i)
                if role is not None:
                    found.setdefault(id(param), set()).add(role)
                elif call.name in _VIEWS:
                    for out in call.outs:
                        owner.setdefault(id(out), []).append(param)
    return {k: next(iter(v)) if len(v) == 1 else Role.OTHER for k, v in found.items()}


def _role(call: Call, position: int) -> Role | None:
    name = call.name
    if name in _VIEWS:
        return None
    if name in ("addmm", "baddbmm", "addmv"):
        return Role.SHIFT if position == 0 else Role.MATRIX
    if name == "convolution":
        return Role.SHIFT if position == 2 else Role.MATRIX
    if name in _CONTRACTIONS:
        return Role.MATRIX
    if "norm" in name and position > 0:
        return (Role.SCALE, Role.SHIFT, Role.STATISTIC, Role.STATISTIC)[min(position, 4) - 1]
    if name in ("embedding", "index", "index_select", "gather"):
        return Role.TABLE
    if name in ("add", "sub", "copy"):
        return Role.SHIFT
    if name in ("mul", "div"):
        return Role.SCALE
    return Role.OTHER
