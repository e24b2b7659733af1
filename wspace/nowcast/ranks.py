"""Several processes training one model: what they must agree on, and parameters in parts.

With one process everything here gives back what it is given.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wspace.errors import NowcastError, message

Group = Any
"""A `torch.distributed.ProcessGroup`, or None for all processes."""
T = TypeVar("T")


class Ranks:
    """The processes that train one model together.

    Args:
        group: Their process group; the default group if None.
        alone: True if this process trains a model of its own whatever others do.
    """

    def __init__(self, group: Group = None, *, alone: bool = False) -> None:
        self._group, self._alone = group, alone

    @property
    def several(self) -> bool:
        """True if there is more than one process."""
        if self._alone or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self._group) > 1

    @property
    def first(self) -> bool:
        """True in the process that predicts for all."""
        return not self.several or dist.get_rank(self._group) == 0

    def any(self, flag: bool) -> bool:
        """True if the flag is set in any process."""
        return flag if not self.several else self.sum(float(flag)) > 0

    def mean(self, value: float) -> float:
        """Mean over the processes."""
        return value if not self.several else self.sum(value) / dist.get_world_size(self._group)

    def sum(self, value: float) -> float:
        """Sum over the processes."""
        x = torch.tensor(value, dtype=torch.float64)
        return float(self.summed(x)) if self.several else value

    def summed(self, x: Tensor) -> Tensor:
        """A small tensor, summed over the processes."""
        sent = x.to(self._device())
        dist.all_reduce(sent, group=self._group)
        return sent.to(x.device)

    def mean_of(self, x: Tensor) -> Tensor:
        """A small tensor, averaged over the processes."""
        return self.summed(x) / dist.get_world_size(self._group)

    def share(self, x: Tensor) -> Tensor:
        """The first process's tensor in all of them, in place where the backend can."""
        if not self.several:
            return x
        gloo = self._device().type == "cpu"
        sent = x.contiguous() if gloo or x.device.type != "cpu" else x.to(self._device())
        root = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.broadcast(sent, src=root, group=self._group)
        return sent if sent is x else x.copy_(sent)

    def check_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Raises, in every process, unless all hold the same tensors, up to rounding.

        Args:
            tensors: What the processes should have in common.

        Raises:
            NowcastError: If they train different models.
        """
        if not (self.several and tensors):
            return
        own = torch.stack([x.detach().sum(dtype=torch.float64).cpu() for x in tensors])
        first = self.share(own.clone())
        if self.any(bool(((own - first).abs() > 1e-3 * (1 + first.abs())).any())):
            raise NowcastError(
                message(
                    "Nowcaster: the processes train different models",
                    expected="replicas of one, as with DistributedDataParallel",
                    help="alone=True, if each trains by itself; or process_group=... of those that "
                    "train together",
                )
            )

    def agree(self, error: Exception | None) -> None:
        """Raises in every process if one has failed, so that none waits for it.

        Args:
            error: What went wrong here, if anything did.

        Raises:
            Exception: What went wrong here.
            NowcastError: If it went wrong elsewhere.
        """
        elsewhere = self.any(error is not None)
        if error is not None:
            raise error
        if elsewhere:
            raise NowcastError(
                message(
                    "Nowcaster: the jump failed in another process",
                    help="its own message says why; no process has moved",
                )
            )

    def together(self, work: Callable[[], T]) -> T:
        """Does work that must succeed in all processes or in none.

        Args:
            work: What to do.

        Returns:
            What it gives.
        """
        try:
            found, error = work(), None
        except Exception as failure:  # raised again below, when all know of it
            self.agree(failure)
            raise
        self.agree(error)
        return found

    def _device(self) -> torch.device:
        nccl = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


# --------------------------------------------------------------- parameters in parts


def in_parts(x: Tensor) -> bool:
    """True for a `DTensor`: this process may hold only a part."""
    found = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return found is not None and isinstance(x, found.DTensor)


def own_part(x: Tensor) -> Tensor:
    """What this process holds of a tensor: of a plain one all, of a `DTensor` the local shard."""
    if not in_parts(x):
        return x.detach()
    part: Any = x.detach()
    return part.to_local()


def like_part(whole: Any, part: Tensor) -> Tensor:
    """A `DTensor` laid out as another, around a local shard; a plain tensor stays plain.

    Args:
        whole: The parameter.
        part: The local values.

    Returns:
        The tensor, without copying.
    """
    if not in_parts(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def gathered(like: Any, part: Tensor) -> Tensor:
    """The whole tensor, given every process's part; all processes must ask."""
    found: Any = like_part(like, part)
    return found.full_tensor() if in_parts(found) else part


def scattered(like: Any, whole: Tensor) -> Tensor:
    """This process's part of the first process's whole tensor; all processes must ask.

    Args:
        like: The parameter.
        whole: The values in the first process; elsewhere anything of that shape.

    Returns:
        The local values.
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements).to_local()


def reducer(like: Any) -> Callable[[Tensor], Tensor]:
    """Sums over the processes that hold different parts of parameters laid out as this one.

    Args:
        like: A `DTensor`.

    Returns:
        A function that sums a tensor.
    """
    mesh = like.device_mesh
    groups = [mesh.get_group(i) for i, how in enumerate(like.placements) if not how.is_replicate()]

    def reduce(x: Tensor) -> Tensor:
        sent = x.to(mesh.device_type)
        for group in groups:
            dist.all_reduce(sent, group=group)
        return sent.to(x.device)

    return reduce


def layouts(tensors: Iterable[tuple[str, Any]]) -> list[tuple[Any, list[str]]]:
    """Names of tensors, by how they are laid out over processes; plain ones under None.

    Args:
        tensors: Names and tensors.

    Returns:
        A layout's first tensor (None for plain ones), and the names, in the order given.
    """
    found: dict[Any, tuple[Any, list[str]]] = {}
    for name, x in tensors:
        key = (x.device_mesh, tuple(x.placements)) if in_parts(x) else None
        found.setdefault(key, (x if key else None, []))[1].append(name)
    return list(found.values())


def reshard(module: nn.Module) -> None:
    """Lets go of whole parameters that `fully_shard` may have left after a forward pass.

    They would be used, as they were, in the next pass, whatever is written to the parts.

    Args:
        module: The module.
    """
    found = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(found, "FSDPModule", ())
    for m in module.modules():
        sharded: Any = m
        if isinstance(sharded, kind):
            sharded.reshard()


def innermost(module: nn.Module) -> nn.Module:
    """The module within wrappers that add a prefix to its parameters' names.

    Args:
        module: Perhaps wrapped by `DistributedDataParallel`, `DataParallel` or `torch.compile`.

    Returns:
        What is wrapped.

    Raises:
        NowcastError: If a wrapper hides the parameters' shapes.
    """
    while True:
        kind = type(module).__name__
        if kind == "FullyShardedDataParallel":
            raise NowcastError(
                message(
                    "Nowcaster: FullyShardedDataParallel flattens parameters",
                    expected="torch.distributed.fsdp.fully_shard (FSDP2), whose parameters keep "
                    "their shapes",
                )
            )
        if kind == "OptimizedModule":
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.get_submodule("module")
        else:
            return module


def chunks(tensors: Sequence[tuple[str, Tensor]], entries: int) -> list[list[str]]:
    """Names in parts of about so many entries; whole tensors, at least one to a part.

    Args:
        tensors: Names and tensors.
        entries: Entries to a part.

    Returns:
        The names, in order.
    """
    found: list[list[str]] = []
    room = 0
    for name, x in tensors:
        if not found or x.numel() > room:
            found.append([])
            room = entries
        found[-1].append(name)
        room -= x.numel()
    return found
