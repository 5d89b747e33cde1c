"""Stored bases as PEFT initialisations, and as the files that an unmodified PEFT script reads."""

from .inits import INITS
from .saving import save
from .start import get_model

__all__ = ["INITS", "get_model", "save"]
