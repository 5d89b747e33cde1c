"""`prep verify`: everything a store says of itself, checked against its bytes, its mathematics and the model's weights.

moments     C - E[x] E[x]^T is positive semi-definite up to the rounding of float32 products, E[x_i^2] >= E[x_i]^2
bases       U^T U = I, S and the spectrum positive and in order; with weights, U^T W = diag(S) P
everywhere  the files that must exist do, checksums, shapes, dtypes, content hashes, attributes; nothing is left over
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from zarr.storage import LocalStore

from ..commands import OF_INPUTS
from ..errors import StoreError
from ..linear import weight_hash
from .artifact import Store
from .bases import Bases
from .basis import BasisSet
from .basis_layout import group_key
from .format import schema
from .format.documents import document
from .format.layout import Layout
from .manifest import basis_entries, files, is_beside, moment_entries
from .moments import LayerMoment
from .record import SHARES, LayerRecord
from .site import HALF, VECTORS

MOMENT_ROUNDING = 1e-5  # of the trace: float32 products of 2,048 tokens err by 5.4e-6 where a channel is constant
HALF_ROUNDING = 2.0**-22  # of the trace: a half is float32


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `where` is the path of an array or group, or a layer's name."""

    where: str
    problem: str


@dataclass
class Report:
    """What was looked at, and what was found to be wrong; the store is whole if `findings` is empty."""

    store: str
    sites: int = 0
    bases: int = 0
    arrays: int = 0
    bytes: int = 0
    weights: int = 0
    findings: list[Finding] = field(default_factory=list)
    entries: dict[str, Layout | None] = field(default_factory=dict, repr=False)
    unknown: list[str] = field(default_factory=list, repr=False)  # folders of which not all that belongs there is known

    def add(self, where: str, problem: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(where, problem))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counts = {name: getattr(self, name) for name in ("store", "sites", "bases", "arrays", "bytes", "weights")}
        return {**counts, "whole": not self.findings, "findings": [vars(finding) for finding in self.findings]}


def verify_store(store: Store, weights: Mapping[str, Tensor] | None = None, numerics: bool = True) -> Report:
    """Check all of a store, going on after a finding. weights: layer name -> W (d_out, d_in) of the model, if given.

    numerics: False leaves out what only a writer can have got wrong: definiteness, orthonormality, order.
    """
    report = Report(store.location, entries={"": None})
    with _noted(report, "moments"):
        if store.corpus is not None:
            _moments(store, report, weights or {}, numerics)
    with _noted(report, "bases"):
        _bases(store, report, weights or {}, numerics)
    for path in [path for path, layout in report.entries.items() if layout is None]:
        _group(store, path, report)
    _strays(store, report)
    return report


@contextlib.contextmanager
def _noted(report: Report, where: str) -> Iterator[None]:
    """Inside, a StoreError becomes a finding."""
    try:
        yield
    except StoreError as error:
        report.findings.append(Finding(where, str(error)))


def _moments(store: Store, report: Report, weights: Mapping[str, Tensor], numerics: bool) -> None:
    moments = store.moments
    read = []
    for site, layers in moments.sites.items():
        with _noted(report, f"moments/{site}"):
            moment = moments[layers[0]]
            report.sites += 1
            read.append(moment)
            _site(moment, report, numerics)
            if set(moment.members) != set(layers):
                report.add(f"moments/{site}", "lists other members than /moments")
            for layer, member in moment.members.items():
                _weight(layer, member, weights, report)
    report.entries |= moment_entries(read)
    report.unknown += ["moments"] if len(read) < len(moments.sites) else []


def _site(moment: LayerMoment, report: Report, numerics: bool) -> None:
    """Hash, definiteness and consistency of one site's arrays."""
    top = f"moments/{moment.site}"
    values: dict[str, list[Tensor]] = {}
    for name in moment.arrays:
        with _noted(report, f"{top}/{name}"):
            values[name] = moment.read(name)
            _count(report, values[name])
    if not numerics:
        return
    own: dict[str, list[Tensor]] = {}
    half: dict[str, list[Tensor]] = {}
    for name, parts in values.items():
        (half if name.startswith(f"{HALF}/") else own)[name.removeprefix(f"{HALF}/")] = parts
    drawn = own.pop("priorities", [])
    own.pop("tokens", None)
    if drawn and not _rising(drawn[0]):
        report.add(f"{top}/priorities", "they do not rise from 0 to 1: these are not those of a sample")
    _possible(top, own, report)
    if moment.half is not None:
        _possible(f"{top}/{HALF}", half, report)
        _others(top, own, half, moment.half.share, report)


def _rising(values: Tensor) -> bool:
    return bool((values.diff() >= 0).all() and values[0] >= 0 and values[-1] <= 1)


def _possible(top: str, values: Mapping[str, list[Tensor]], report: Report) -> None:
    """Whether arrays of a site, vectors or panels by name, can be the moments of one sample."""
    if "mean" not in values:
        return
    mean = values["mean"][0].double()
    if "diagonal" in values:
        diagonal = values["diagonal"][0].double()
        if bool((diagonal - mean**2 < -MOMENT_ROUNDING * diagonal.abs()).any()):
            report.add(f"{top}/diagonal", "E[x_i^2] is below E[x_i]^2: these are no moments of one sample")
    for name in values.keys() - set(VECTORS):
        C = _lower(values[name])
        slack = MOMENT_ROUNDING * float(C.diagonal().sum())
        if name == "second_moment":
            C -= torch.outer(mean, mean)  # the factorisation looks at the lower triangle only
        if not _definite(C, slack):
            what = "C - E[x] E[x]^T" if name == "second_moment" else "the moment"
            report.add(f"{top}/{name}", f"{what} is not positive semi-definite: these are no moments of a sample")


def _others(
    top: str, whole: Mapping[str, list[Tensor]], half: Mapping[str, list[Tensor]], share: float, report: Report
) -> None:
    """Whether what a site's matrices are without its first half can be the moments of the other tokens."""
    noted = {finding.where for finding in report.findings}
    for name in (whole.keys() & half.keys()) - set(VECTORS):
        if noted & {f"{top}/{name}", f"{top}/{HALF}/{name}"}:
            continue
        C = _lower(whole[name])
        slack = HALF_ROUNDING * float(C.diagonal().sum())
        C -= share * _lower(half[name])
        if not _definite(C, slack + MOMENT_ROUNDING * float(C.diagonal().sum())):
            report.add(
                f"{top}/{HALF}/{name}", "C - share C_half is not positive semi-definite: this is no part of the sample"
            )


def _lower(panels: list[Tensor]) -> Tensor:
    """The lower triangle (d, d) that panels make up, float64."""
    d = panels[-1].shape[1]
    C = torch.zeros(d, d, dtype=torch.float64)
    for (a, b), panel in zip(schema.panels(d), panels, strict=True):
        C[a:b, :b] = panel
    return C


def _definite(C: Tensor, slack: float) -> bool:
    """Whether C + slack I has a Cholesky factor; C is given up."""
    C.diagonal().add_(slack + torch.finfo(torch.float64).tiny)
    return int(torch.linalg.cholesky_ex(C).info) == 0


def _bases(store: Store, report: Report, weights: Mapping[str, Tensor], numerics: bool) -> None:
    bases = Bases(store.root)
    if bases.names:
        report.entries["bases"] = None
    for name in bases:
        with _noted(report, f"bases/{name}"):
            basis = bases.open(name)
            report.bases += 1
            report.entries |= basis_entries(basis)
            if basis.status != "complete":
                _ = bases[name]
            if sorted(basis.layers) != sorted(basis.expected):
                report.add(f"bases/{name}", "its records are not those of its groups' layers")
            if basis.hash != schema.content_hash(f"{n} {basis.layers[n].hash}" for n in sorted(basis.layers)):
                report.add(f"bases/{name}", "the content hash is not that of its layers' hashes")
            for layer, record in basis.layers.items():
                with _noted(report, f"bases/{name}: {layer}"):
                    _layer(basis, layer, record, report, weights, numerics)


def _layer(
    basis: BasisSet, layer: str, record: LayerRecord, report: Report, weights: Mapping[str, Tensor], numerics: bool
) -> None:
    """Hash, orthonormality, order and, with its weight, the identity of one layer's basis."""
    where, basis_layer = f"bases/{basis.name}: {layer}", basis[layer]
    shares = {role: values for role in SHARES for values in basis.shares(role, [layer]).values()}
    parts = {"U": basis_layer.U[:, : record.rank], "S": basis_layer.S[: record.rank], "P": basis_layer.P[: record.rank]}
    _count(report, [*parts.values(), basis_layer.spectrum, *shares.values()])
    stored = [(parts["U"].T, basis.dtype), (parts["P"], basis.dtype)]
    stored += [(parts["S"], "float64"), (basis_layer.spectrum, "float64")]
    if record.hash != schema.content_hash(schema.as_stored(value, dtype) for value, dtype in stored):
        arrays = f"bases/{basis.name}/{group_key(record.shape)}/{{{','.join([*basis.factors, 'S', 'spectrum'])}}}"
        report.add(where, f"row {record.index} of {arrays} does not match its hash: restore the store from a copy")
    known = _weight(layer, vars(record), weights, report)
    if not numerics:
        return
    for role, values in shares.items():
        if (values < 0).any() or float(values.sum()) > 1 + MOMENT_ROUNDING:
            report.add(where, f"{role} are no shares of one output: they are below 0, or above 1 in all")
    eps = torch.finfo(schema.DTYPES[basis.dtype]).eps
    U, S, P = (parts[role].double() for role in "USP")
    off = float((U.T @ U - torch.eye(U.shape[1], dtype=torch.float64)).abs().max())
    if off > 8 * eps:
        report.add(where, f"U is not orthonormal: U^T U is off by {off:.1e}")
    of_inputs = basis.method.get("metric") in OF_INPUTS  # of a C of low rank, whose S end in zeros
    if not ((S >= 0) if of_inputs else (S > 0)).all():
        report.add(where, "S is not positive")
    if (basis_layer.spectrum < 0).any() or (basis_layer.spectrum.diff() > 0).any():
        report.add(where, "the spectrum is not positive or not in descending order")
    if known and not of_inputs and basis.repair is None:  # U^T E = diag(S) P there, and E is not at hand
        left = U.T @ weights[layer].double()
        drift = float((left - S[:, None] * P).norm() / weights[layer].double().norm().clamp_min(1e-300))
        if drift > (2 + record.rank**0.5) * eps:
            report.add(where, f"U^T W = diag(S) P does not hold for the model's weight: off by {drift:.1e}")


def _weight(layer: str, record: Mapping[str, Any], weights: Mapping[str, Tensor], report: Report) -> bool:
    """Whether the model's weight is given and is the one that the record names."""
    if not weights:
        return False
    if layer not in weights or tuple(weights[layer].shape) != tuple(record["shape"]):
        report.add(layer, "the model has no such layer of that shape")
        return False
    report.weights += 1
    if weight_hash(weights[layer]) != record.get("weight_hash"):
        report.add(layer, "the model's weight is not the one that the store was made from")
        return False
    return True


def _count(report: Report, tensors: list[Tensor]) -> None:
    report.arrays += 1
    report.bytes += sum(tensor.nbytes for tensor in tensors)


def _group(store: Store, path: str, report: Report) -> None:
    """A group's own zarr.json; those without attributes are read by nothing else."""
    try:
        document(store.root.store, path, "group")
    except (FileNotFoundError, ValueError) as error:
        report.add(path or "/", f"its zarr.json is missing or damaged ({error}): restore the store from a copy")
    except StoreError as error:
        report.add(path or "/", str(error))


def _strays(store: Store, report: Report) -> None:
    """Files that a store of these attributes does not have; only a local directory can be listed at no cost."""
    if not isinstance(store.root.store, LocalStore):
        return
    root = store.root.store.root
    expected = set(files(report.entries))
    # where a group could not be read, what belongs below it is not known
    unknown = tuple(f"{where}/" for where in [*report.unknown, *(one.where.split(":")[0] for one in report.findings)])
    for file in sorted(root.rglob("*")):
        if (
            file.is_file()
            and (name := file.relative_to(root).as_posix()) not in expected
            and not name.startswith(unknown)
            and not is_beside(name)
        ):
            report.add(name, "does not belong to the store: an interrupted or foreign writer left it; remove it")
