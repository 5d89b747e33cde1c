"""Reading a basis of a store: its attributes when it is opened, directions of some layers when these are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import zarr
from torch import Tensor

from ..commands import decompose_command
from ..errors import StoreError, did_you_mean
from .basis_layout import Place, checked_group, factor_places, group_arrays, group_key, shape_of
from .display import html_table
from .format import schema
from .format.arrays import OTHER_VERSION, Region
from .format.documents import check_size
from .format.untrusted import BASIS
from .record import LayerRecord, checked_record, chunks_known, is_known_row


@dataclass(frozen=True, repr=False)
class Basis:
    """The basis of one layer: U (d_out, r), S (r,), P (r, d_in)."""

    U: Tensor
    S: Tensor
    P: Tensor
    record: LayerRecord
    _spectrum: Callable[[], Tensor]

    def __repr__(self) -> str:
        d_out, d_in = self.record.shape
        return f"Basis({d_out} x {d_in}, rank {len(self.S)}, energy {self.energy:.3f} at rank {self.record.rank})"

    @property
    def spectrum(self) -> Tensor:
        """The singular values of W M (k,), read when asked for: training does not need them."""
        return self._spectrum()

    @property
    def energy(self) -> float:
        """Share of the squared spectrum that all stored directions capture."""
        return self.record.energy


class BasisSet(Mapping[str, Basis]):
    """One named basis of a store: layer name -> Basis. Opening it reads attributes only."""

    def __init__(self, name: str, group: zarr.Group):
        attrs = schema.attributes(group, BASIS)
        self.name, self._group = name, group
        self.status = str(attrs["status"])
        self.method: dict[str, Any] = attrs["method"]
        self.dtype = str(attrs["dtype"])
        self.model: dict[str, Any] = attrs["model"]
        self.repair: dict[str, Any] | None = attrs.get("repair")  # the copy whose error was decomposed (copies.py)
        self.hash = str(attrs.get("hash", ""))
        self.files: str | None = attrs.get("files")
        self.layout = int(attrs.get("layout", 1))
        try:
            self._groups = {shape_of(key): checked_group(key, group) for key, group in attrs["groups"].items()}
            self._check_sizes()
            chunks = {shape: self._chunks(shape) for shape in self._groups}
            self.layers = {
                layer: checked_record(layer, record, self._groups[shape], chunks[shape])
                for layer, record in attrs["layers"].items()
                for shape in [tuple(record["shape"])]
            }
            if any((record.repaired is None) != (self.repair is None) for record in self.layers.values()):
                raise ValueError(name)
        except (KeyError, ValueError) as error:
            raise StoreError(f"the attributes of basis {name!r} are damaged: restore the store from a copy") from error
        self._opened: dict[Place, schema.Array] = {}
        self.expected = [layer for group in self._groups.values() for layer in group["layers"]]
        if self.status == "complete":
            self._check_complete()

    def _check_sizes(self) -> None:
        """StoreError if an array is too large to be credible."""
        for shape in self._groups:
            for role, layout in self.arrays(shape).items():
                check_size(layout, self.dtype, f"{schema.name_of(self._group)}/{group_key(shape)}/{role}")

    def _chunks(self, shape: tuple[int, int]) -> int:
        """Chunks of U and P of one layer."""
        layouts = self.arrays(shape)
        row = (slice(0, 1),)
        return sum(len(list(layouts[name].cover(layouts[name].bounds(row)))) for name in self.factors)

    def _check_complete(self) -> None:
        """StoreError unless the records are those of all layers, and those that the basis was finished with."""
        if sorted(self.layers) != sorted(self.expected):
            raise StoreError(f"the records of basis {self.name!r} are not those of its groups' layers: it is damaged")
        if self.hash != schema.content_hash(f"{layer} {self.layers[layer].hash}" for layer in sorted(self.layers)):
            raise StoreError(
                f"the hash of basis {self.name!r} is not that of its records: restore the store from a copy"
            )

    def __repr__(self) -> str:
        method = ", ".join(f"{key}={value!r}" for key, value in self.method.items() if value is not None)
        return f"BasisSet({self.name!r}, {self.status}, {len(self.layers)} layers, {method}, dtype={self.dtype!r})"

    def _repr_html_(self) -> str:
        """For notebooks: shape, rank and kept energy of every layer."""
        rows = ((name, "{} x {}".format(*x.shape), x.rank, f"{x.energy:.3f}") for name, x in self.layers.items())
        return html_table(repr(self), ("layer", "shape", "rank", "energy"), rows, len(self))

    def __getitem__(self, layer: str) -> Basis:
        return self.read([layer])[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def read(
        self, layers: Iterable[str] | None = None, rank: int | Mapping[str, int] | None = None
    ) -> dict[str, Basis]:
        """The bases of `layers` (all by default), sliced to the first `rank` directions, or to those of each layer.

        A layer whose stored rank is below `rank` comes with all it has. StoreError for an unknown layer.
        """
        wanted = self.checked(layers)
        arrays = self.open_arrays({self.layers[layer].shape for layer in wanted}, (*self.factors, "S"))
        regions: list[tuple[schema.Array, Region]] = []
        known: dict[tuple[str, int], int] = {}
        ranks = {layer: rank[layer] if isinstance(rank, Mapping) else rank for layer in wanted}
        for layer in wanted:
            record = self.layers[layer]
            row, first = slice(record.index, record.index + 1), slice(0, ranks[layer])
            places = factor_places(record.shape, self.layout)
            regions += [(arrays[record.shape, name], (row, first, columns)) for name, columns in places.values()]
            # S comes whole, as its chunk does: its checksum is that of all directions
            regions.append((arrays[record.shape, "S"], (row,)))
            known |= chunks_known(record, [arrays[record.shape, name] for name in self.factors], first)
        values = iter(schema.read_each(regions, known))
        out = {}
        for layer in wanted:
            U, P, S = (next(values)[0] for _ in "UPS")
            self._check_row(layer, "S", S)
            out[layer] = Basis(U.T, S[: ranks[layer]], P, self.layers[layer], partial(self._read_spectrum, layer))
        return out

    def checked(self, layers: Iterable[str] | None) -> list[str]:
        """The layers, all by default. StoreError for an unknown one."""
        wanted = list(self.layers) if layers is None else list(layers)
        for layer in wanted:
            if layer not in self.layers:
                meant = did_you_mean(layer, self.layers) or "; `prep info` lists its layers"
                raise StoreError(f"basis {self.name!r} does not hold the layer {layer}{meant}")
        return wanted

    @property
    def rank(self) -> int:
        """Directions of the layers that have most: what was asked for, clipped at their shapes."""
        return max((group["rank"] for group in self._groups.values()), default=0)

    @property
    def place(self) -> str:
        """The path of its group in the store: `bases/<name>`, unless a replacement was cut short."""
        return self._group.path

    def command(self, rank: int) -> str:
        """The `prep decompose` command that makes this basis anew with another rank."""
        return decompose_command(self.name, self.method, rank, True, schema.place_of(self._group), self.repair)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (d_out, d_in) of its layers."""
        return list(self._groups)

    def arrays(self, shape: tuple[int, int]) -> dict[str, schema.Layout]:
        """The arrays of the layers of one shape, by role."""
        return group_arrays(shape, self._groups[shape], self.dtype, self.layout)

    @property
    def factors(self) -> list[str]:
        """The arrays that hold U and P."""
        return list(dict.fromkeys(name for name, _ in factor_places((1, 1), self.layout).values()))

    def kept(self, layer: str) -> Tensor | None:
        """Share of E||W x||^2 that each stored direction keeps, (r,) float64, on the tokens the basis was made of.

        Of the input variance for metric components (EVA). None where the store does not know it.
        """
        return self.shares("kept", [layer]).get(layer)

    def unseen(self, layer: str) -> Tensor | None:
        """`kept` on tokens that the basis has not seen: the mean over bases of two parts, each on the other part.

        None where not all layers were cross-fitted.
        """
        return self.shares("unseen", [layer]).get(layer)

    def shares(self, role: str, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """`kept` or `unseen` of the layers (all by default) that have it, each chunk read once."""
        records = {layer: self.layers[layer] for layer in self.checked(layers)}
        records = {layer: one for layer, one in records.items() if role in self.arrays(one.shape)}
        arrays = self.open_arrays({one.shape for one in records.values()}, [role])
        rows = [(arrays[one.shape, role], (slice(one.index, one.index + 1),)) for one in records.values()]
        out = {}
        for (layer, record), values in zip(records.items(), schema.read_each(rows), strict=True):
            self._check_row(layer, role, values[0])
            out[layer] = values[0][: record.rank]
        return out

    def open_arrays(self, shapes: Iterable[tuple[int, int]], roles: Collection[str]) -> dict[Place, schema.Array]:
        """The arrays by shape and role, those that are there, checked against their layouts when first asked for."""
        layouts = {(shape, role): layout for shape in sorted(shapes) for role, layout in self.arrays(shape).items()}
        wanted = {place: f"{group_key(place[0])}/{place[1]}" for place in layouts if place[1] in roles}
        new = {place: layouts[place] for place in wanted if place not in self._opened}
        opened = schema.open_arrays(self._group, {wanted[place]: layout for place, layout in new.items()})
        self._opened |= {place: opened[wanted[place]] for place in new}
        return self._opened

    def spectra(self) -> Iterator[tuple[str, Tensor]]:
        """Every layer with its spectrum (k,), each chunk read once."""
        for shape, group in self._groups.items():
            array = self.open_arrays([shape], ["spectrum"])[shape, "spectrum"]
            for first in range(0, len(group["layers"]), schema.ROWS):
                names = group["layers"][first : first + schema.ROWS]
                rows = schema.read(array, (slice(first, first + len(names)),))
                for layer, spectrum in zip(names, rows, strict=True):
                    self._check_row(layer, "spectrum", spectrum)
                    yield layer, spectrum

    def _read_spectrum(self, layer: str) -> Tensor:
        record = self.layers[layer]
        array = self.open_arrays([record.shape], ["spectrum"])[record.shape, "spectrum"]
        spectrum = schema.read(array, (slice(record.index, record.index + 1),))[0]
        self._check_row(layer, "spectrum", spectrum)
        return spectrum

    def _check_row(self, layer: str, role: str, row: Tensor) -> None:
        """StoreError if a layer's row of S, of the spectrum or of shares is not the one that its record knows."""
        record = self.layers[layer]
        if not is_known_row(record, role, row):
            where = f"{schema.name_of(self._group)}/{group_key(record.shape)}/{role}"
            raise StoreError(f"{where} (row {record.index}, {layer}) is {OTHER_VERSION}: restore the store from a copy")
