"""The zarr artifact: schema, moments, bases, provenance, integrity.

Names are loaded on first use: the errors are needed where torch and zarr are not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import Store, create_store, open_store
    from .bases import Bases
    from .basis import Basis, BasisSet
    from .basis_writer import BasisWriter
    from .moment_writer import MomentWriter, begin_moments
    from .moments import LayerMoment, Moments
    from .record import LayerRecord
    from .site import SiteData

_EXPORTS = {
    **dict.fromkeys(("Store", "create_store", "open_store"), ".artifact"),
    "Bases": ".bases",
    **dict.fromkeys(("Basis", "BasisSet"), ".basis"),
    "BasisWriter": ".basis_writer",
    **dict.fromkeys(("MomentWriter", "begin_moments"), ".moment_writer"),
    **dict.fromkeys(("LayerMoment", "Moments"), ".moments"),
    "LayerRecord": ".record",
    "SiteData": ".site",
}

__all__ = [
    "Bases",
    "Basis",
    "BasisSet",
    "BasisWriter",
    "LayerMoment",
    "LayerRecord",
    "MomentWriter",
    "Moments",
    "SiteData",
    "Store",
    "begin_moments",
    "create_store",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
