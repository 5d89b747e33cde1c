"""What a decomposition is asked for: the metric of the SVD, the directions kept, and the moments that this needs.

`PUBLISHED` says in these words what PiSSA (arXiv 2404.02948), MiLoRA (2406.09044), CorDA (2406.05223), SVD-LLM
(2403.07378), ASVD (2312.05821), EVA (2410.07170), LoRA-Null (2503.02659), MiCA (2604.01694), Astra (2602.19111),
AntiPaSTO (2601.07473) and LoRA-XS (2405.17604) decompose.
"""

from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from ...commands import METRICS, OF_INPUTS, default_name
from ...errors import PrepError, did_you_mean

SELECTIONS = ("top", "bottom", "activation")
POOLINGS = ("rms", "mean_abs")
SOLVERS = ("auto", "exact", "svd", "randomized")
MOMENT_KINDS = ("full", "diagonal", "output")


def one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises PrepError that lists the allowed values."""
    if value not in allowed:
        meant = did_you_mean(str(value), allowed)
        raise PrepError(f"{what} {value!r} does not exist: take one of {', '.join(allowed)}{meant}")


@dataclass(frozen=True)
class Method:
    """What the SVD is taken in (metric, power, damping, center) and which directions are kept (select, pooling, rank).

    damping is relative to mean(diag C); epsilon, when given, is the absolute form and replaces it. center takes the
    mean out of C. pooling is that of an activation: its root mean square, or the mean of its magnitude over a sample of
    tokens. Power 0 is metric identity; metric components is always centred, null never. Raises PrepError.
    """

    metric: str = "full"
    power: float = 0.5
    select: str = "top"
    rank: int = 256
    damping: float = 1e-3
    epsilon: float | None = None
    center: bool = False
    solver: str = "auto"
    pooling: str = "rms"

    def __post_init__(self) -> None:
        one_of("metric", self.metric, METRICS)
        one_of("select", self.select, SELECTIONS)
        one_of("solver", self.solver, SOLVERS)
        one_of("pooling", self.pooling, POOLINGS)
        if self.rank < 1:
            raise PrepError(f"rank {self.rank} is too small: ask for at least 1")
        for name in ("power", "damping", "epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < inf:
                raise PrepError(f"{name} {value:g} is not allowed: give a finite number >= 0")
        if self.power == 0 and self.metric in ("full", "diagonal"):
            object.__setattr__(self, "metric", "identity")
        if self.center and self.metric == "identity":
            raise PrepError("center has no effect in metric identity: leave it out, or take metric full or diagonal")
        if self.solver == "randomized" and self.select != "top":
            raise PrepError(f"solver randomized finds the top only, not {self.select}: take solver exact")
        if self.pooling != "rms" and self.select != "activation":
            raise PrepError(f"pooling {self.pooling} is for select activation, not {self.select}: take that, or rms")
        if self.metric in OF_INPUTS:
            object.__setattr__(self, "center", self.metric == "components")
            if self.select != "top":
                raise PrepError(f"metric {self.metric} keeps the top only, not {self.select}: take select top")
            if self.solver not in ("auto", "exact"):
                raise PrepError(f"metric {self.metric} has no solver {self.solver}: take solver exact")


PUBLISHED: dict[str, Method] = {
    "pissa": Method("identity"),
    "milora": Method("identity", select="bottom"),
    "mica": Method("identity", select="bottom"),
    "corda_ipm": Method("full", power=1),
    "corda_kpm": Method("full", power=1, select="bottom"),
    "whitened": Method("full"),
    "antipasto_corda": Method("full"),
    "asvd": Method("diagonal"),
    "antipasto_asvd": Method("diagonal"),
    "astra": Method("full", damping=0),
    "eva": Method("components"),
    "lora_null": Method("null"),
    "antipasto": Method("identity", select="activation"),
    "antipasto_rot": Method("identity", select="activation"),
    "antipasto_ablate": Method("identity", select="activation"),
    "antipasto_dplr": Method("identity", select="activation"),
    "antipasto_arrow": Method("identity", select="activation"),
    "lora_xs": Method("identity"),
}


def method_for(published: str | None, **asked: Any) -> Method:
    """The published method, or the default, with every option that is not None put over it.

    Raises PrepError, also for an option that would make a published method another one.
    """
    one_of("--for", published or "whitened", tuple(PUBLISHED))
    base = PUBLISHED[published] if published else Method()
    given = {name: value for name, value in asked.items() if value is not None}
    fixed = ["metric", "power", "select", "center"] + ["damping", "epsilon"] * (base.damping == 0)
    for name in fixed if published else ():
        if name in given and given[name] != getattr(base, name):
            raise PrepError(
                f"{published} has the {name} {getattr(base, name)}, not {given[name]}: leave out --{name}, or leave "
                "out --for and give --metric, --power and --select"
            )
    return replace(base, **given)


def basis_name(method: Method) -> str:
    """The default name of a basis: `full`, `full-p1-bottom`, `full-undamped`, `identity-activation`, `eva` ..."""
    return default_name(asdict(method))


def check(moment_kind: str | None, method: Method) -> str | None:
    """Why a layer with this moment kind (None: no moment) cannot serve the method, in one line; None if it can."""
    metric, activation = method.metric, method.select == "activation"
    if metric == "identity" and not activation:
        return None
    if moment_kind is None:
        return f"{'select activation' if activation else f'metric {metric}'} needs moments: run `prep covariance` first"
    wish = None
    if metric in OF_INPUTS or (metric == "full" and moment_kind == "diagonal"):
        wish = f"metric {metric}"
    elif metric == "full" and method.power != 0.5:
        wish = f"metric full at power {method.power:g}"
    elif metric == "full" and method.solver == "svd":
        wish = "solver svd in metric full"
    elif activation and method.pooling == "rms" and moment_kind == "diagonal":
        wish = "select activation"
    if wish is None or moment_kind == "full":
        return None
    return f"{wish} needs the full second moment, not {moment_kind}: run `prep covariance --moment full`"


def check_tokens(sampled: bool, method: Method) -> str | None:
    """Why a layer with or without a sample of its tokens cannot serve the method; None if it can."""
    if method.pooling == "rms" or sampled:
        return None
    return f"pooling {method.pooling} needs a sample of the tokens, and none was kept"
