"""Stored bases as PEFT initialisations, and as the files that an unmodified PEFT script reads."""

from .start import INITS, get_model, save

__all__ = ["INITS", "get_model", "save"]
