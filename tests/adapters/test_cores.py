"""Each core against an independent float64 implementation that writes the residual weight and the full formula."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from prep.adapters.coefficient import Coefficient
from prep.adapters.cores import CORES, Core, Rotation
from prep.adapters.layer import AdaptedLinear
from prep.errors import PrepError

D_OUT, D_IN, R = 12, 20, 10
CASES: list[tuple[str, dict]] = [
    ("gain", {}),
    ("gain", {"suppress_only": True}),
    ("rotation", {}),
    ("rotation", {"rotate": "U"}),
    ("rotation", {"rotate": "both", "block": 3}),
    ("rotation", {"rotate": "none"}),
    ("rotation", {"block": 64}),
    ("ablation", {}),
    ("ablation", {"k": 3}),
    ("dplr", {"k": 2}),
    ("dplr", {"suppress_only": True}),
    ("arrow", {"block": 4}),
    ("arrow", {"block": 64, "suppress_only": True}),
    ("dense", {}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in CASES]


def a_basis(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W (d_out, d_in) and the whitened SVD of it for a random second moment: U (d_out, r), S (r,), P (r, d_in)."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((D_OUT, D_IN))
    X = rng.standard_normal((200, D_IN)) * np.linspace(0.2, 3, D_IN)
    root = np.linalg.cholesky(X.T @ X / 200)
    U, S, Vt = np.linalg.svd(W @ root, full_matrices=False)
    return W, U[:, :R], S[:R], Vt[:R] @ np.linalg.inv(root)


def a_layer(name: str, options: dict, seed: int = 0, bias: bool = True) -> AdaptedLinear:
    """An adapted nn.Linear whose core parameters are random."""
    W, U, S, P = (torch.from_numpy(part) for part in a_basis(seed))
    torch.manual_seed(seed)
    base = nn.Linear(D_IN, D_OUT, bias=bias)
    base.weight.data = W.float()
    layer = AdaptedLinear(base, U.float(), P.float(), CORES[name](**options).on(S))
    randomize(layer.core)
    return layer


def randomize(core: Core) -> None:
    for parameter in core.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    if hasattr(core, "a"):
        core.a.data = core.a.data.abs() + 0.3


def set_s(layer: AdaptedLinear, s: float) -> None:
    layer.core.coefficient.set(s)
    layer.core.coeff = torch.full_like(layer.core.coeff, s)


def block_rotation(theta: np.ndarray, s: float, block: int, angle: float, r: int) -> np.ndarray:
    """The (r, r) block-diagonal Cayley rotation, entry by entry."""
    R_full, limit = np.eye(r), 2 * np.tan(angle / 2)
    for i, entries in enumerate(theta):
        A, values = np.zeros((block, block)), iter(entries)
        for a in range(block):
            for b in range(a + 1, block):
                A[a, b] = s * limit * np.tanh(next(values) / limit)
                A[b, a] = -A[a, b]
        Q = np.linalg.inv(np.eye(block) - A / 2) @ (np.eye(block) + A / 2)
        R_full[i * block : (i + 1) * block, i * block : (i + 1) * block] = Q
    return R_full


def reference(layer: AdaptedLinear, x: np.ndarray, s: float) -> np.ndarray:
    """y = x @ W_res.T + (full coordinates) @ U.T + bias, in float64."""
    core = layer.core
    w = {name: p.detach().double().numpy() for name, p in core.named_parameters()}
    U, P, S = layer.U.double().numpy(), layer.P.double().numpy(), w["S"]
    W = layer.base_layer.weight.detach().double().numpy()
    p = x @ P.T
    h = p * S
    if "g" in w:
        g = np.minimum(w["g"], 0) if core.suppress_only else w["g"]
        gain = np.where(s * g > 0, s * g, np.expm1(s * g))
    match type(core).__name__:
        case "Gain":
            full = p * (S * (1 + gain))
        case "Rotation":
            b = min(core.block, R)
            turn = {
                side: block_rotation(w[f"theta_{side}"], s, b, core.angle, R) if f"theta_{side}" in w else np.eye(R)
                for side in "VU"
            }
            full = ((p @ turn["V"].T) * (S + s * w["d"])) @ turn["U"].T
        case "Ablation":
            Q, _ = np.linalg.qr(w["c"])
            full = h @ (np.eye(R) - s * Q @ np.diag(np.clip(w["a"], 0, 1)) @ Q.T)
        case "DPLR":
            full = p @ (np.diag(S * (1 + gain)) + s * w["B"] @ w["A"]).T
        case "Arrow":
            b = len(w["M"])
            inner = np.zeros((R, R))
            inner[:b, :b] = np.eye(b) + s * w["M"]
            inner[b:, b:] = np.diag(1 + gain)
            full = h @ inner.T
        case "Dense":
            full = h @ (np.eye(R) + s * w["R"]).T
    return x @ (W - (U * S) @ P).T + full @ U.T + layer.base_layer.bias.detach().double().numpy()


@pytest.mark.parametrize("s", [1.0, -0.7])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_layer_matches_the_residual_form(name, options, s):
    layer = a_layer(name, options)
    set_s(layer, s)
    x = torch.randn(4, 7, D_IN)
    expected = reference(layer, x.double().numpy(), s)
    y = layer(x).detach().numpy()
    base = layer.base_layer(x).detach().numpy()
    assert np.linalg.norm(y - base) > 1e-2 * np.linalg.norm(base)
    assert np.linalg.norm(y - expected) < 1e-6 * np.linalg.norm(expected)
    merged = x.double() @ (layer.base_layer.weight + layer.matrix()).double().T + layer.base_layer.bias
    assert np.linalg.norm(merged.detach().numpy() - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_gradients_agree_with_finite_differences(name, options):
    core = a_layer(name, options).core.double()
    core.coeff = torch.tensor(0.6, dtype=torch.float64)
    names = [n for n, p in core.named_parameters() if p.requires_grad]
    values = [core.get_parameter(n).detach().clone().requires_grad_() for n in names]
    p = torch.randn(3, R, dtype=torch.float64, requires_grad=True)

    def forward(p, *values):
        return functional_call(core, dict(zip(names, values, strict=True)), (p,))

    assert torch.autograd.gradcheck(forward, (p, *values))


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_start_and_coefficient_zero_are_bitwise_the_base(name, options, mode):
    layer = a_layer(name, options)
    fresh = CORES[name](**options).on(layer.core.S)
    trained, layer.core = layer.core, fresh
    if mode == "bfloat16":
        layer.base_layer.bfloat16()  # U and P stay in float32, as on a quantised base
    x = torch.randn(5, D_IN, dtype=layer.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), torch.no_grad():
        base = layer.base_layer(x)
        assert torch.equal(layer(x), base) == (name != "ablation")
        layer.core = trained
        assert not torch.equal(layer(x), base)
        set_s(layer, 0.0)
        y = layer(x)
    assert torch.equal(y, base)
    assert y.dtype == base.dtype


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_low_precision_computes_in_float32(name, options):
    """Mixed precision may cast parameters down; the core then still computes in float32."""
    layer = a_layer(name, options)
    p = torch.randn(6, R)
    exact = layer.change(p)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.change(p), exact)
    for parameter in layer.core.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rounded = layer.change(p)
    layer.core.bfloat16()
    low = layer.change(p)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, rounded, rtol=1e-5, atol=1e-5)
    low.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.core.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_every_parameter_has_a_gradient_within_two_steps(name, options):
    """At the start B = 0 hides A; everything else must learn at once."""
    layer = a_layer(name, options)
    layer.core = CORES[name](**options).on(layer.core.S)
    x, target = torch.randn(16, D_IN), torch.randn(16, D_OUT)
    trainable = [(n, p) for n, p in layer.core.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trainable], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        dead = {n for n, p in trainable if p.numel() and not p.grad.any()}
        assert dead == ({"A"} if name == "dplr" and step == 0 else set())
        optimizer.step()


def test_suppress_only_attenuates():
    for name in ("gain", "dplr", "arrow"):
        layer = a_layer(name, {"suppress_only": True})
        for parameter in layer.core.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.data.zero_()
        layer.core.g.data = torch.linspace(-2, 2, len(layer.core.g))
        K = layer.change(torch.eye(R)).diagonal() / layer.core.S
        assert (K <= 0).all()
        assert (K > -1).all()
        assert (K < -0.1).any()


def test_rotation_is_orthogonal_bounded_and_reversible():
    core = Rotation(block=2, angle=0.5).on(torch.ones(6))
    core.theta_V.data = torch.tensor([[0.1], [-30.0], [0.0]])
    core.d.data.zero_()
    forth = torch.eye(6) + core(torch.eye(6))
    core.coeff = torch.tensor(-1.0)
    back = torch.eye(6) + core(torch.eye(6))
    torch.testing.assert_close(forth @ forth.T, torch.eye(6))
    torch.testing.assert_close(forth @ back, torch.eye(6))
    angles = torch.atan2(forth[[1, 3, 5], [0, 2, 4]], forth[[0, 2, 4], [0, 2, 4]])
    torch.testing.assert_close(angles.abs(), torch.tensor([0.0994, 0.5, 0.0]), rtol=0, atol=1e-3)


def test_published_start_of_the_rotation_bias():
    torch.manual_seed(0)
    d = Rotation(bias=4e-4).on(torch.ones(5000)).d
    assert abs(d.mean().item() - 4e-4) < 3e-5
    assert abs(d.std().item() - 4e-4) < 3e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gain", {"angle": 1}, "no option 'angle' .*suppress_only=False"),
        ("dense", {"k": 1}, "no option 'k' .*has: none"),
        ("rotation", {"block": "4"}, "takes int, not '4'"),
        ("rotation", {"block": True}, "takes int, not True"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(PrepError, match=message):
        CORES[name](**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotation", {"rotate": "W"}),
        ("rotation", {"block": 1}),
        ("rotation", {"angle": 4}),
        ("ablation", {"k": 0}),
        ("ablation", {"alpha": 1.5}),
        ("dplr", {"k": 0}),
        ("arrow", {"block": 0}),
    ],
)
def test_senseless_options_are_refused(name, options):
    with pytest.raises(PrepError, match="|".join(options)):
        CORES[name](**options).on(torch.ones(8))


def test_a_core_declares_its_options_by_annotation():
    class Scaled(Core):
        power: float = 1
        label: str = "a"

        def build(self, r):
            self.g = nn.Parameter(torch.zeros(r, dtype=torch.bfloat16))

        def forward(self, p):
            return self.s * p * self.g * self.S**self.power

    core = Scaled(power=2)
    assert core.options == {"power": 2.0, "label": "a"}
    built = core.on(torch.ones(3, dtype=torch.float64))
    assert built.options == core.options
    assert {name: p.dtype for name, p in built.named_parameters()} == {"S": torch.float32, "g": torch.float32}
    assert [name for name, p in built.named_parameters() if p.requires_grad] == ["g"]
    assert list(built.state_dict()) == ["S", "g"]
    with pytest.raises(NotImplementedError, match="build"):
        Core().on(torch.ones(3))


def test_a_copied_coefficient_is_independent():
    first = Coefficient()
    first.set(0.25)
    other = copy.deepcopy(first)
    assert other.value == 0.25
    assert other.key != first.key
    other.set(2.0)
    assert first.value == 0.25


def test_the_log_of_the_coefficient_does_not_grow_without_a_graph():
    coefficient = Coefficient()
    for s in range(100):
        coefficient.set(float(s))
    assert len(coefficient.log) <= 2
    assert coefficient.value == 99.0
