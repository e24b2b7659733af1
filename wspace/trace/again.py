"""A module of a known space run once more, for what else there is to see in it."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from wspace.errors import SpaceMismatch, message
from wspace.space import WeightSpace
from wspace.trace import named
from wspace.trace.capture import capture
from wspace.trace.derive import Naming, build_params
from wspace.trace.program import Program, Value
from wspace.trace.rules import known
from wspace.trace.sandbox import persistent_float_buffers
from wspace.trace.sites import correspondence

ValueOf = Callable[[Tensor], Value]


@dataclass(frozen=True, slots=True)
class Run:
    """A solved run of a module of a space.

    Attributes:
        space: The space.
        module: The module.
        program: What it ran.
        naming: The groups found in the run.
        names: Group of the run → group of the space.
    """

    space: WeightSpace
    module: nn.Module
    program: Program
    naming: Naming
    names: Mapping[str, str]


class Look(Protocol):
    """Something to be seen in a run."""

    def within(self, module: nn.Module, value_of: ValueOf) -> AbstractContextManager[Any]:
        """A context for a run; entered anew if the module has to be run in another way."""
        ...

    def read(self, run: Run) -> Any:
        """What was seen, once the run is solved."""
        ...


def look(
    space: WeightSpace,
    module: nn.Module,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    *looks: Look,
) -> tuple[Any, ...]:
    """Runs a module once and says what each look has seen.

    Args:
        space: Its weight space.
        module: The module; no weights are needed, and it is left as it was.
        args: Example positional inputs (a single tensor stands for a tuple of one).
        kwargs: Example keyword inputs.
        *looks: What to look for.

    Returns:
        One result for each look.

    Raises:
        SpaceMismatch: If the module is not of this space.
        TraceError: If the module fails on these inputs.
    """  # noqa: DOC502 (capture raises)
    args = (args,) if isinstance(args, Tensor) else tuple(args)

    @contextmanager
    def within(value_of: ValueOf) -> Generator[None]:
        with ExitStack() as stack:
            for each in looks:
                stack.enter_context(each.within(module, value_of))
            yield

    program = capture(module, args, kwargs or {}, known, within)
    naming, _ = named(program)
    buffers = {name for name, _ in persistent_float_buffers(module)}
    params = build_params(naming, program, buffers, {})
    if {p.name: p.shape for p in params} != {p.name: p.shape for p in space.params}:
        raise SpaceMismatch(
            message(
                f"trace: {type(module).__name__} is not a module of this space",
                expected="the parameters and buffers that the space lists",
                help="trace this module: wspace.trace(module, args, kwargs)",
            )
        )
    run = Run(space, module, program, naming, correspondence(space, params))
    return tuple(each.read(run) for each in looks)
