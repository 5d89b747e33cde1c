"""prep: calibrate once, decompose once, train many times.

Names are loaded on first use, so that `import prep` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "PrepError": ".errors",
    "StoreError": ".errors",
    "open_store": ".store",
    "covariance": ".preprocess.covariance",
    "decompose": ".preprocess.decompose",
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
    "verify": ".preprocess.verify",
    "pool": ".store.pool",
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
    return sorted([*globals(), *_EXPORTS])
