"""What is kept of one site: moments of all tokens, of the first half of them, a sample; its arrays and its record.

An array of the half is called `half/<array>` beside those of all tokens, and is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import xxhash
from torch import Tensor

from ..errors import StoreError
from .format import schema
from .format.arrays import OTHER_VERSION, Region
from .format.documents import check_size
from .sample import TokenSample

VECTORS = ("mean", "diagonal")
SAMPLE = "sample"
SAMPLED = ("tokens", "priorities")
MOMENT_DTYPES = ("float64", "float32")
HALF = "half"
HALF_DTYPE = "float32"
AT_ONCE = 2**26  # bytes of a matrix that is read whole, and not panel by panel


@dataclass(frozen=True)
class SiteData:
    """What a calibration pass knows of one site when it is written.

    members: layer name -> {"shape": [d_out, d_in], "weight_hash": str, "weight_dtype": str}; count: real tokens.
    second_moment and outputs are given as block-triangular panels (see `schema.panels`). half: the same of the first
    tokens, which make up `share` of the moments (that of their count, unless tokens were weighted). sample: of the
    tokens, where one was kept.
    """

    kind: str
    members: dict[str, dict[str, Any]]
    count: int
    mean: Tensor
    second_moment: list[Tensor] | None = None
    diagonal: Tensor | None = None
    outputs: dict[str, list[Tensor]] | None = None
    half: SiteData | None = None
    share: float = 1.0
    sample: TokenSample | None = None

    def arrays(self) -> dict[str, Tensor | list[Tensor]]:
        """The arrays of its moments by name, without those of the half and of the sample."""
        arrays: dict[str, Tensor | list[Tensor]] = {"mean": self.mean}
        if self.second_moment is not None:
            arrays["second_moment"] = self.second_moment
        if self.diagonal is not None:
            arrays["diagonal"] = self.diagonal
        return arrays | {f"output/{layer}": panels for layer, panels in (self.outputs or {}).items()}


def site_arrays(
    kind: str, members: Mapping[str, tuple[int, int]], halved: bool = False, sampled: int = 0
) -> dict[str, schema.Layout]:
    """The arrays of a site by name. members: layer -> (d_out, d_in); halved: with those of its first half.

    sampled: with a sample of so many tokens.
    """
    d = next(iter(members.values()))[1]
    arrays = {"mean": schema.vector(d, *MOMENT_DTYPES)}
    if kind == "full":
        arrays["second_moment"] = schema.symmetric(d, *MOMENT_DTYPES)
    else:
        arrays["diagonal"] = schema.vector(d, *MOMENT_DTYPES)
    if kind == "output":
        arrays |= {f"output/{layer}": schema.symmetric(m, *MOMENT_DTYPES) for layer, (m, _) in members.items()}
    if halved:
        arrays |= {f"{HALF}/{name}": replace(layout, dtypes=(HALF_DTYPE,)) for name, layout in arrays.items()}
    return arrays | (sample_arrays(sampled, d) if sampled else {})


def sample_arrays(n: int, d: int) -> dict[str, schema.Layout]:
    """The arrays of a sample of n tokens by name."""
    return {"tokens": schema.rows(n, d, "float32"), "priorities": schema.vector(n, "float64")}


def site_data(record: Mapping[str, Any], parts: dict[str, list[Tensor]]) -> SiteData:
    """A site by its record and its arrays by name, symmetric matrices as panels."""
    own = {name: value for name, value in parts.items() if not name.startswith(f"{HALF}/")}
    first = {name.removeprefix(f"{HALF}/"): value for name, value in parts.items() if name not in own}
    whole = _data(record, int(record["count"]), own)
    if "tokens" in own:
        whole = replace(whole, sample=TokenSample(own["tokens"][0], own["priorities"][0]))
    if not first:
        return whole
    half = record[HALF]
    return replace(whole, half=replace(_data(record, half["count"], first), share=float(half["share"])))


def _data(record: Mapping[str, Any], count: int, parts: dict[str, list[Tensor]]) -> SiteData:
    outputs = {name.split("/", 1)[1]: panels for name, panels in parts.items() if name.startswith("output/")}
    return SiteData(
        kind=str(record["kind"]),
        members=record["members"],
        count=count,
        mean=parts["mean"][0],
        second_moment=parts.get("second_moment"),
        diagonal=parts["diagonal"][0] if "diagonal" in parts else None,
        outputs=outputs or None,
    )


def site_record(data: SiteData, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The record of a site. hashes: array name -> hash of its content."""
    record: dict[str, Any] = {"kind": data.kind, "members": data.members, "count": data.count}
    if data.half is not None:
        record[HALF] = {"count": data.half.count, "share": data.half.share}
    if data.sample is not None:
        record[SAMPLE] = len(data.sample.tokens)
    return {**record, "arrays": dict(hashes), "hash": combined(hashes)}


def combined(hashes: Mapping[str, str]) -> str:
    """One hash over named ones."""
    return schema.content_hash(f"{name} {hashes[name]}" for name in sorted(hashes))


def checked_half(record: Mapping[str, Any], where: str) -> tuple[int, float] | None:
    """Count and share of a site's first half by its attributes; None where it has none. StoreError if damaged."""
    half = record.get(HALF)
    if half is None:
        return None
    count, share = half["count"], float(half["share"])
    if not (schema.is_count(count, 1) and count < record["count"] and 0 < share < 1):
        raise StoreError(f"{where} has a half of {count} tokens with the share {share}: it is damaged")
    return count, share


def checked_sample(record: Mapping[str, Any], where: str) -> int:
    """How many of a site's tokens were kept by its attributes, 0 where it has no sample. StoreError if damaged."""
    n = record.get(SAMPLE, 0)
    if SAMPLE in record and not (schema.is_count(n, 1) and n <= record["count"]):
        raise StoreError(f"{where} has a sample of {n} of {record['count']} tokens: it is damaged")
    return n


def check_hashes(record: Mapping[str, Any], where: str, layouts: Mapping[str, schema.Layout]) -> None:
    """StoreError unless a site's hashes are those of its arrays, which can be as large as they are said to be."""
    if record["arrays"].keys() != layouts.keys():
        raise StoreError(f"{where} does not hold the arrays of its kind: it is damaged")
    if record["hash"] != combined(record["arrays"]):
        raise StoreError(f"{where} has a hash that is not that of its arrays' hashes: it is damaged")
    for name, layout in layouts.items():
        check_size(layout, layout.dtypes[0], f"{where}/{name}")


def read_parts(array: schema.Array, known: str, row: int | None = None) -> Iterator[tuple[Region, Tensor]]:
    """A symmetric matrix panel by panel, any other array at once, with their places; StoreError at the end of one whose
    hash is not `known`. row: of an array that stacks those of many sites.
    """
    stacked: Region = () if row is None else (slice(row, row + 1),)
    digest, shape = xxhash.xxh3_128(), array.layout.shape[len(stacked) :]
    panels = [(slice(a, b), slice(0, b)) for a, b in schema.panels(shape[0])]
    regions: list[Region] = [*panels] if array.layout.lower else [()]
    size, together = math.prod(shape) * schema.DTYPES[array.dtype].itemsize, 1
    if size <= AT_ONCE:
        together = len(regions)
    for first in range(0, len(regions), together):
        some = regions[first : first + together]
        parts = schema.read_each([(array, (*stacked, *region)) for region in some])
        for region, part in zip(some, parts, strict=True):
            own = part[0] if stacked else part
            digest.update(own.numpy().data)
            yield region, own
    if digest.hexdigest() != known:
        raise StoreError(f"{array} is {OTHER_VERSION}: restore the store from a copy")
