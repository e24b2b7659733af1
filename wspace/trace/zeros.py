"""Which units are zero in the activations when all their parameters are, and where one is not.

A unit is switched off by zeros in its parameters if what is computed from them is zero up to the
place where units are summed: in a product it is enough that one side is zero. Where neither side
is, as in attention with positive feature maps, a unit of zeros still counts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from wspace.trace.program import PARAM, Call, Program, Value
from wspace.trace.rules import arguments

_PRODUCT = frozenset(
    """
    mul mm bmm mv dot vdot linear convolution _convolution convolution_overrideable
    mkldnn_convolution _trilinear _grouped_mm embedding _embedding_bag _embedding_bag_forward_only
    prelu _prelu_kernel outer _weight_norm _weight_norm_interface
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math
    _scaled_dot_product_attention_math_for_mps
    """.split()
)
"""Zero if one of the operands is (a bias that is added on top has to be zero, too)."""
_KEEPS = frozenset(
    """
    relu gelu silu tanh neg abs sqrt sin erf elu leaky_relu celu selu mish hardtanh hardswish sign
    square atan asinh sinh tan softshrink hardshrink threshold view _unsafe_view reshape permute
    transpose t expand unsqueeze squeeze slice select split split_with_sizes unsafe_split chunk
    unbind clone _to_copy alias detach repeat constant_pad_nd flip roll index_select gather index
    pixel_shuffle pixel_unshuffle im2col col2im unfold as_strided view_as_real view_as_complex
    avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool2d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
    _upsample_nearest_exact2d mean sum amax amin max min cumsum native_dropout dropout copy lift
    contiguous repeat_interleave channel_shuffle narrow movedim unflatten flatten real imag
    _fft_r2c _fft_c2r _fft_c2c diagonal tril triu reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d div pow lerp
    """.split()
)
"""Zero if the first operand is; others are only divided by, or say where to look."""
_SUM = frozenset("add sub rsub maximum minimum where copy_to addcmul logaddexp".split())
_JOIN = frozenset("cat stack".split())
_NORM = {
    "native_batch_norm": ("weight", "bias"),
    "_native_batch_norm_legit_no_training": ("weight", "bias"),
    "_batch_norm_no_update": ("weight", "bias"),
    "native_layer_norm": ("weight", "bias"),
    "native_group_norm": ("weight", "bias"),
    "_fused_rms_norm": ("weight",),
    "rms_norm": ("weight",),
}
"""Zero if gain and shift are, whatever comes in; without a shift the gain is enough."""


class Zeros:
    """Follows the zeros of switched-off units through a program.

    Args:
        program: A solved program.
        groups: Free groups of the space that a value's axes have units of.
        idle: Parameter and group along which zeros mean nothing (directions under `weight_norm`).
        buffers: Names of buffers: they are not set to zero.
    """

    def __init__(
        self,
        program: Program,
        groups: Callable[[Value], frozenset[str]],
        idle: Iterable[tuple[str, str]],
        buffers: Iterable[str],
    ) -> None:
        self.program, self.groups = program, groups
        self.idle, self.buffers = frozenset(idle), frozenset(buffers)
        self.off: dict[int, frozenset[str]] = {}

    def left_on(self) -> Iterator[tuple[Call, str]]:
        """Where units are summed although they are on: the operator and the group.

        Yields:
            Each such place, in the order of the run.
        """
        for call in self.program.calls:
            bound = arguments(call)
            for group in self._summed(call, bound):
                yield call, group
            found = self._result(call, bound)
            for value in call.outs:
                self.off[id(value)] = found & self.groups(value)

    def _zero(self, value: Value) -> frozenset[str]:
        known = self.off.get(id(value))
        if known is not None:
            return known
        if value.kind != PARAM or value.names[0] in self.buffers:
            return frozenset()
        return frozenset(g for g in self.groups(value) if (value.names[0], g) not in self.idle)

    def _summed(self, call: Call, bound: Mapping[str, object]) -> Iterator[str]:
        """Groups that a contraction or a sum takes together and that nothing switches off."""
        if call.name == "sum":
            inside = [self.groups(v) for v in call.ins]
        elif call.name.startswith("_scaled_dot_product"):
            inside = [self.groups(v) for v in call.ins[:2]]
        elif call.name in _PRODUCT or call.name in ("addmm", "baddbmm", "addmv"):
            inside = [self.groups(v) for v in _factors(call, bound)]
        else:
            return
        out = frozenset[str]().union(*(self.groups(v) for v in call.outs))
        factors = call.ins if call.name == "sum" else _factors(call, bound)
        for group in sorted(frozenset[str]().union(*inside) - out):
            if not any(group in self._zero(v) for v in factors):
                yield group

    def _result(self, call: Call, bound: Mapping[str, object]) -> frozenset[str]:
        """Groups whose units are zero in what a call returns."""
        name, ins = call.name, call.ins
        if name == "uniform":
            fresh = str(call.op).startswith(("aten.zeros", "aten.new_zeros"))
            return frozenset[str]().union(*map(self.groups, call.outs)) if fresh else frozenset()
        if name in _NORM:
            held = [v for k in _NORM[name] if isinstance(v := bound.get(k), Value)]
            return _all(self._zero(v) for v in held)
        if name in ("addmm", "baddbmm", "addmv"):
            product = frozenset[str]().union(*map(self._zero, _factors(call, bound)))
            added = bound.get("self")
            return product & self._zero(added) if isinstance(added, Value) else product
        if name in _PRODUCT:
            product = frozenset[str]().union(*map(self._zero, _factors(call, bound)))
            bias = bound.get("bias")
            return product & self._zero(bias) if isinstance(bias, Value) else product
        if name in _SUM:
            return frozenset() if _shifted(call) else _all(map(self._zero, ins))
        if name in _JOIN:
            every = frozenset[str]().union(*map(self.groups, ins))
            return frozenset(
                g for g in every if all(g in self._zero(v) for v in ins if g in self.groups(v))
            )
        return self._zero(ins[0]) if name in _KEEPS and ins else frozenset()


def _factors(call: Call, bound: Mapping[str, object]) -> list[Value]:
    """The operands of a product, without what is added to it."""
    added = [bound.get("bias")]
    if call.name in ("addmm", "baddbmm", "addmv"):
        added.append(bound.get("self"))
    return [v for v in call.ins if not any(v is a for a in added)]


def _shifted(call: Call) -> bool:
    """True if a number other than zero is added."""
    numbers = [x for x in call.args[:2] if isinstance(x, int | float)]
    return any(numbers)


def _all(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    found = list(sets)
    return frozenset.intersection(*found) if found else frozenset()
