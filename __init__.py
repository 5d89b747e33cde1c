"""prep: calibrate once, decompose once, train many times.

Names are loaded on first use, so that `import prep` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import peft as peft
    from .adapters import testing as testing
    from .adapters.attach import attach as attach
    from .adapters.attach import detach as detach
    from .adapters.attach import merge as merge
    from .adapters.attach import unmerge as unmerge
    from .adapters.cores import Core as Core
    from .adapters.peft.export import export as export
    from .adapters.saved import load as load
    from .adapters.saved import save as save
    from .adapters.variants import VARIANTS as VARIANTS
    from .errors import Interrupted as Interrupted
    from .errors import PrepError as PrepError
    from .errors import StoreError as StoreError
    from .preprocess.covariance import covariance as covariance
    from .preprocess.decompose import decompose as decompose
    from .preprocess.evaluate import evaluate as evaluate
    from .preprocess.verify import verify as verify
    from .reporting.report import report as report
    from .store import open_store as open_store
    from .store.info import info as info
    from .store.pool import pool as pool
    from .store.ranks import ranks as ranks
    from .store.remove import remove as remove
    from .store.transfer import pull as pull
    from .store.transfer import push as push

__version__ = "0.1.0"

_EXPORTS = {
    "Interrupted": ".errors",
    "PrepError": ".errors",
    "StoreError": ".errors",
    "open_store": ".store",
    "covariance": ".preprocess.covariance",
    "decompose": ".preprocess.decompose",
    "evaluate": ".preprocess.evaluate",
    "attach": ".adapters.attach",
    "detach": ".adapters.attach",
    "merge": ".adapters.attach",
    "unmerge": ".adapters.attach",
    "save": ".adapters.saved",
    "load": ".adapters.saved",
    "Core": ".adapters.cores",
    "VARIANTS": ".adapters.variants",
    "testing": ".adapters.testing",
    "peft": ".adapters.peft",
    "export": ".adapters.peft.export",
    "info": ".store.info",
    "report": ".reporting.report",
    "verify": ".preprocess.verify",
    "pool": ".store.pool",
    "ranks": ".store.ranks",
    "remove": ".store.remove",
    "push": ".store.transfer",
    "pull": ".store.transfer",
}

_MODULES = ("testing", "peft")

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = import_module(_EXPORTS[name], __name__)
        return module if name in _MODULES else getattr(module, name)
    raise AttributeError(f"module 'prep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *_EXPORTS])
