"""HyperLSTM and its control: against the equations, `torch.nn.LSTM`, and themselves cut in two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import HyperError
from wspace.hyper.cells.gates import Norms, orthogonal
from wspace.hyper.cells.hyper_lstm import HyperLSTM, HyperLSTMCell
from wspace.hyper.cells.hyper_recurrence import HyperState
from wspace.hyper.cells.layer_norm_lstm import LayerNormLSTM, LayerNormLSTMCell, LSTMState
from wspace.testing import assert_close, assert_same

X, H, M, NZ, T, B = 3, 5, 4, 2, 6, 7
DOUBLE = torch.float64
BOTH = pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "normalised"])
MODELS = pytest.mark.parametrize("model", [HyperLSTM, LayerNormLSTM])
Model = Callable[..., Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)


def made(model: Model, *, layers: int = 1, sizes: tuple[int, int] = (X, H), **options: Any) -> Any:
    """A model in float64 whose parameters are all random: at the start many are 0."""
    small = (M, NZ) if model is HyperLSTM else ()
    net = model(*sizes, *small, layers, dtype=DOUBLE, generator=seeded(), **options)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(normal(*p.shape, seed=i), alpha=0.3)
    return net


def state_of(net: Any, batch: int = B, *, grad: bool = False) -> Any:
    cell = net.cells[0]
    shapes = [(len(net.cells), batch, n) for n in cell.widths()]
    parts = [normal(*s, seed=20 + i).requires_grad_(grad) for i, s in enumerate(shapes)]
    return cell.pack(parts)


# ------------------------------------------------------------------ the equations


def normalised(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-3) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * scale + shift


def gates(
    y: list[Tensor], c: Tensor, norm: Any, mask: Tensor | None, forget: float
) -> tuple[Tensor, Tensor]:
    """The cell from four pre-activations, in the order i, f, g, o."""
    if norm is not None:
        pairs = zip(norm.gate_scale.chunk(4), norm.gate_shift.chunk(4), strict=True)
        y = [normalised(a, *pair) for a, pair in zip(y, pairs, strict=True)]
    i, f, g, o = y
    g = g.tanh() if mask is None else g.tanh() * mask
    c = torch.sigmoid(f + forget) * c + torch.sigmoid(i) * g
    seen = c if norm is None else normalised(c, norm.cell_scale, norm.cell_shift)
    return torch.sigmoid(o) * seen.tanh(), c


def by_equations(
    cell: HyperLSTMCell, x: Tensor, state: HyperState, masks: Tensor | None = None
) -> tuple[Tensor, HyperState]:
    """Steps and gates one by one, with the embeddings z, as the paper has it."""
    h, c, small_h, small_c = state
    out: list[Tensor] = []
    for t, x_t in enumerate(x):
        parts = zip(
            cell.hyper_weight_x.chunk(4),
            cell.hyper_weight_h.chunk(4),
            cell.hyper_bias.chunk(4),
            strict=True,
        )
        both = torch.cat([h, small_h], -1)
        y = [x_t @ wx.T + both @ wh.T + b for wx, wh, b in parts]
        small_h, small_c = gates(y, small_c, cell.hyper_norm, None, cell.forget_bias)
        y = []
        for k in range(4):
            z_h = small_h @ cell.embed[0, k].T + cell.embed_bias[0, k]
            z_x = small_h @ cell.embed[1, k].T + cell.embed_bias[1, k]
            z_b = small_h @ cell.embed[2, k].T
            d_h, d_x = z_h @ cell.scale[0, k].T, z_x @ cell.scale[1, k].T
            b = z_b @ cell.scale[2, k].T + cell.bias.chunk(4)[k]
            rows = slice(k * cell.hidden_size, (k + 1) * cell.hidden_size)
            y.append(d_h * (h @ cell.weight_h[rows].T) + d_x * (x_t @ cell.weight_x[rows].T) + b)
        mask = None if masks is None else masks[t]
        h, c = gates(y, c, cell.norm, mask, cell.forget_bias)
        out.append(h)
    return torch.stack(out), HyperState(h, c, small_h, small_c)


@BOTH
@pytest.mark.parametrize("fused", [True, False])
def test_hyper_lstm_is_its_equations(layer_norm: bool, fused: bool) -> None:
    net = made(HyperLSTM, layer_norm=layer_norm, fused=fused)
    state = state_of(net)
    x = normal(T, B, X, seed=9)
    want, end = by_equations(net.cells[0], x, HyperState(*(s[0] for s in state)))
    out, last = net(x, state)
    assert_close(want, out)
    assert_close(list(end), [s[0] for s in last])
    with torch.no_grad():
        assert_close(want, net(x, state)[0])


def test_equations_see_a_wrong_time_index() -> None:
    """The factors are of the new h^; those of the one before would be another function."""
    net = made(HyperLSTM)
    cell, state = net.cells[0], state_of(net)
    x = normal(1, B, X, seed=9)
    new = by_equations(cell, x, HyperState(*(s[0] for s in state)))[1].hyper_h
    d_new, d_old = cell.factors(new)[0], cell.factors(state.hyper_h[0])[0]
    assert (d_new - d_old).abs().max() > 1e-2
    assert d_new.shape == (B, 4, H)


@BOTH
def test_layer_norm_lstm_is_its_equations(layer_norm: bool) -> None:
    net = made(LayerNormLSTM, layer_norm=layer_norm)
    cell, state, x = net.cells[0], state_of(net), normal(T, B, X, seed=9)
    h, c = (s[0] for s in state)
    want: list[Tensor] = []
    for x_t in x:
        sums = x_t @ cell.weight_x.T + h @ cell.weight_h.T + cell.bias
        h, c = gates(list(sums.chunk(4, -1)), c, cell.norm, None, cell.forget_bias)
        want.append(h)
    out, last = net(x, state)
    assert_close(torch.stack(want), out)
    assert_close([h, c], [s[0] for s in last])


def lstm_like(cell: HyperLSTMCell, factor: float) -> nn.LSTM:
    """torch's LSTM with a HyperLSTM's matrices times a factor, and the forget bias."""
    lstm = nn.LSTM(cell.input_size, cell.hidden_size, dtype=DOUBLE)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(factor * cell.weight_x)
        lstm.weight_hh_l0.copy_(factor * cell.weight_h)
        lstm.bias_ih_l0.zero_()
        lstm.bias_hh_l0.zero_()
        lstm.bias_ih_l0[cell.hidden_size : 2 * cell.hidden_size] = cell.forget_bias
    return lstm


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_at_the_start_it_is_an_lstm_with_a_tenth_of_the_weights(noise: float) -> None:
    cell = HyperLSTMCell(X, H, M, 3, noise=noise, dtype=DOUBLE, generator=seeded())
    net = HyperLSTM(X, H, M, 3, dtype=DOUBLE)
    net.cells[0] = cell
    x = normal(T, B, X)
    assert_close(lstm_like(cell, 0.1)(x)[0], net(x)[0])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(lstm_like(cell, 0.11)(x)[0], net(x)[0])
    d_h, d_x, b = cell.factors(normal(B, M))
    for d in (d_h, d_x):
        assert_close(torch.full_like(d, 0.1), d)
    assert not b.any()


def test_matrices_are_orthogonal_for_each_gate() -> None:
    cell = HyperLSTMCell(X, H, M, NZ, dtype=DOUBLE, generator=seeded())
    for w in (*cell.weight_h.chunk(4), *cell.hyper_weight_h[:, H:].chunk(4)):
        torch.testing.assert_close(w @ w.T, torch.eye(len(w), dtype=DOUBLE), atol=1e-5, rtol=0)
    for w in cell.weight_x.chunk(4):
        torch.testing.assert_close(w.T @ w, torch.eye(X, dtype=DOUBLE), atol=1e-5, rtol=0)
    assert 0.003 < cell.embed[2].std() < 0.03 and not cell.embed[:2].any()
    assert_same(orthogonal(4, 3, seeded(5)), orthogonal(4, 3, seeded(5)))


def test_plain_control_is_torchs_lstm() -> None:
    net = LayerNormLSTM(X, H, layer_norm=False, dtype=DOUBLE, generator=seeded())
    x = normal(T, B, X)
    assert_close(lstm_like(net.cells[0], 1.0)(x)[0], net(x)[0])


def test_published_counts() -> None:
    """Char-PTB of the paper: 4.25, 4.91 and 4.92 million, the output layer included."""

    def count(*parts: nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    with torch.device("meta"):
        head = nn.Linear(1000, 50)
    sizes: dict[str, Any] = {"device": "meta"}
    assert count(LayerNormLSTM(50, 1000, layer_norm=False, **sizes), head) == 4_254_050
    assert count(HyperLSTM(50, 1000, 128, 4, **sizes), head) == 4_911_874
    assert count(HyperLSTM(50, 1000, 128, 4, layer_norm=True, **sizes), head) == 4_923_154


# ---------------------------------------------------------------------- gradients


def gradients(net: Any, x: Tensor, state: Any, fused: bool, order: int = 1) -> list[Tensor]:
    """Of a loss in which all outputs count, by inputs, states and parameters."""
    for cell in net.cells:
        cell.fused = fused
    out, end = net(x, state)
    weights = (k + 1.0 for k in range(9))
    loss = out.sin().sum() + sum(w * s.cos().sum() for w, s in zip(weights, end, strict=False))
    by = [x, *state, *net.parameters()]
    found = torch.autograd.grad(loss, by, create_graph=order > 1)
    if order > 1:
        found = torch.autograd.grad(sum(g.square().sum() for g in found), by)
    return list(found)


@MODELS
@BOTH
@pytest.mark.parametrize("rows", [256, 21, 1])
def test_gradients_by_hand_are_autograds(
    model: Model, layer_norm: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all steps taken back at once, with two parts of which one is short, with one each."""
    module = "hyper_recurrence" if model is HyperLSTM else "layer_norm_lstm"
    monkeypatch.setattr(f"wspace.hyper.cells.{module}.ROWS", rows)
    net = made(model, layers=2, layer_norm=layer_norm)
    x = normal(4, B, X, seed=5).requires_grad_()
    state = state_of(net, grad=True)
    want, found = (gradients(net, x, state, fused) for fused in (False, True))
    assert all(g.abs().max() > 1e-6 for g in want)
    for a, b in zip(want, found, strict=True):
        assert_close(a, b)


@MODELS
@BOTH
def test_gradients_with_dropout(model: Model, layer_norm: bool) -> None:
    net = made(model, layer_norm=layer_norm, recurrent_dropout=0.4)
    x, state = normal(T, B, X).requires_grad_(), state_of(net, grad=True)
    found: list[list[Tensor]] = []
    for fused in (False, True):
        torch.manual_seed(3)
        found.append(gradients(net, x, state, fused))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@MODELS
@BOTH
def test_second_derivatives_are_autograds(model: Model, layer_norm: bool) -> None:
    net = made(model, layer_norm=layer_norm)
    x, state = normal(3, 2, X).requires_grad_(), state_of(net, 2, grad=True)
    want, found = (gradients(net, x, state, fused, order=2) for fused in (False, True))
    for a, b in zip(want, found, strict=True):
        assert_close(a, b)


@BOTH
def test_gradcheck(layer_norm: bool) -> None:
    net = made(HyperLSTM, sizes=(2, 3), layer_norm=layer_norm)
    names = [name for name, _ in net.named_parameters()]
    x, state = normal(3, 2, 2).requires_grad_(), state_of(net, 2, grad=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, rest[4:], strict=True))
        out, end = torch.func.functional_call(net, weights, (x, HyperState(*rest[:4])))
        return out, *end

    inputs = (x, *state, *net.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_frozen_parameters_and_retained_graphs() -> None:
    net = made(HyperLSTM, layer_norm=True)
    net.cells[0].weight_h.requires_grad_(False)
    x = normal(T, B, X).requires_grad_()
    loss = net(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, net.cells[0].embed], retain_graph=True)
    again = torch.autograd.grad(loss, [x, net.cells[0].embed])
    assert_same(list(first), list(again))


def test_published_start_ties_embeddings_for_ever() -> None:
    """Equal factors in a row of S and zeros in A: the entries of z get equal gradients."""
    x, y = normal(T, B, X), normal(T, B, H, seed=1)
    for noise in (0.0, 0.02):
        net = HyperLSTM(X, H, M, NZ, noise=noise, dtype=DOUBLE, generator=seeded())
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(net(x)[0], y).backward()
            optimizer.step()
        cell = net.cells[0]
        assert cell.embed[:2].abs().min() > 1e-4
        apart = (cell.embed[:2, :, :1] - cell.embed[:2, :, 1:]).abs().max()
        assert (apart < 1e-12) if noise == 0 else (apart > 1e-3)


# ------------------------------------------------------------------ the interface


@MODELS
@BOTH
def test_two_halves_are_the_whole(model: Model, layer_norm: bool) -> None:
    net = made(model, layers=2, layer_norm=layer_norm)
    x = normal(T, B, X)
    whole, end = net(x)
    first, middle = net(x[:2])
    second, last = net(x[2:], middle)
    assert_close(whole, torch.cat([first, second]))
    assert_close(list(end), list(last))
    assert (net(x[2:])[0] - second).abs().max() > 1e-3  # without the state it is not


@MODELS
@BOTH
def test_examples_do_not_see_each_other(model: Model, layer_norm: bool) -> None:
    net = made(model, layer_norm=layer_norm)
    x = normal(T, B, X)
    whole = net(x)[0]
    assert_close(whole, torch.cat([net(part)[0] for part in x.split(2, 1)], 1))
    other = x.clone()
    other[:, 1] += 1
    moved = (net(other)[0] - whole).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [i == 1 for i in range(B)]


@MODELS
def test_steps_of_a_cell_are_the_sequence(model: Model) -> None:
    net = made(model)
    x, state = normal(T, B, X), None
    out: list[Tensor] = []
    for x_t in x:
        state = net.cells[0](x_t, state)
        out.append(state.h)
    assert_close(net(x)[0], torch.stack(out))


@MODELS
def test_batch_first_and_shapes(model: Model) -> None:
    net = made(model, layers=2, batch_first=True)
    x, state = normal(B, T, X), state_of(net)
    out, end = net(x, state)
    assert out.shape == (B, T, H) and [s.shape for s in end] == [s.shape for s in state]
    assert_close(out[:, -1], end.h[-1])
    net.batch_first = False
    assert_close(out.transpose(0, 1), net(x.transpose(0, 1), state)[0])
    assert not end.detach().h.requires_grad and end.h.requires_grad


def test_dropout_is_for_training_only() -> None:
    net = made(HyperLSTM, recurrent_dropout=0.5)
    x = normal(T, B, X)
    torch.manual_seed(0)
    first, second = net(x)[0], net(x)[0]
    assert (first - second).abs().max() > 1e-3
    net.eval()
    assert_same(net(x)[0], net(x)[0])
    net.cells[0].recurrent_dropout = 0.0
    assert_same(net(x)[0], net.train()(x)[0])


def test_dropout_masks_as_the_equations_say() -> None:
    net = made(HyperLSTM, recurrent_dropout=0.5, layer_norm=True)
    cell, x = net.cells[0], normal(T, B, X)
    zeros = HyperState(*(x.new_zeros(B, n) for n in cell.widths()))
    torch.manual_seed(4)
    out = net(x)[0]
    torch.manual_seed(4)
    masks = torch.empty(T, B, H, dtype=DOUBLE).bernoulli_(0.5) / 0.5
    assert_close(by_equations(cell, x, zeros, masks)[0], out)


def test_other_dtypes_and_autocast() -> None:
    net = HyperLSTM(X, H, M, NZ, layer_norm=True, generator=seeded())
    x = normal(T, B, X)
    want = HyperLSTM(X, H, M, NZ, layer_norm=True, dtype=DOUBLE, generator=seeded())(x)[0]
    assert (net(x.float())[0] - want).abs().max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x.bfloat16())[0]
        out.sum().backward()
    assert out.dtype == torch.float32 and (out - want).abs().max() < 2e-2


@MODELS
def test_autocast_does_not_touch_gradients(model: Model) -> None:
    net = made(model, layer_norm=True).float()
    x = normal(T, B, X).float()
    found: list[list[Tensor]] = []
    for inside in (False, True):
        out = net(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(list(torch.autograd.grad(out, [net.cells[0].weight_h])))
    assert_same(*found)


def test_generator_decides() -> None:
    a, b, c = (HyperLSTM(X, H, M, NZ, generator=seeded(s)).state_dict() for s in (1, 1, 2))
    assert_same(a, b)
    assert any(not x.equal(c[name]) for name, x in a.items())


@MODELS
def test_what_is_refused(model: Model) -> None:
    net = made(model)
    x = normal(T, B, X)
    with pytest.raises(HyperError, match=r"(?s)input does not fit.*last axis 3.*\(6, 7, 2\)"):
        net(x[..., :2])
    with pytest.raises(HyperError, match="no empty axis"):
        net(x[:0])
    with pytest.raises(HyperError, match=r"(?s)\(time, batch, input_size\).*\(6, 3\)"):
        net(x[:, 0])
    with pytest.raises(HyperError, match="PackedSequence"):
        net(nn.utils.rnn.pack_sequence([x[0], x[1]]))
    with pytest.raises(HyperError, match="float64"):
        net(x.float())
    with pytest.raises(HyperError, match=r"state does not fit"):
        net(x, state_of(net, B - 1))
    with pytest.raises(HyperError, match=r"state does not fit"):
        net(x, net.cells[0].pack([s.float() for s in state_of(net)]))
    with pytest.raises(HyperError, match="recurrent_dropout"):
        model(X, H, recurrent_dropout=1.0)
    with pytest.raises(HyperError, match="positive"):
        model(X, 0)
    with pytest.raises(HyperError, match="positive"):
        model(X, H, num_layers=0)


def test_functional_transforms_need_the_plain_loop() -> None:
    net = made(HyperLSTM)
    x = normal(T, B, X)

    def loss(x: Tensor) -> Tensor:
        return net(x)[0].square().sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(x)
    net.cells[0].fused = False
    found = torch.func.grad(loss)(x)
    by_autograd = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    assert_close(by_autograd, found)


def test_states_and_norms_are_tuples() -> None:
    assert LSTMState._fields == HyperState._fields[:2] and len(Norms._fields) == 4
    assert isinstance(LayerNormLSTMCell(X, H)(torch.zeros(B, X)), LSTMState)
