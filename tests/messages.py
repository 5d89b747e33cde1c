"""Whole sentences of errors: what a call in the working directory must say, and that it leaves every file as it was."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny

import prep


def check(call: Callable[[], Any], sentence: str) -> None:
    """The call raises this one line and nothing in the working directory changes.

    In a sentence, `...` stands for what other packages say, for measured numbers and for paths of this machine.
    """
    before = tiny.contents(".")
    with pytest.raises(prep.PrepError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    wanted = ".+".join(map(re.escape, sentence.split("...")))
    assert re.fullmatch(wanted, line), f"\nsaid:   {line}\nwanted: {sentence}"
    assert tiny.contents(".") == before
