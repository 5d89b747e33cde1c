"""stub"""

import os
import shutil
from pathlib import Path


def resolved(location):
    return os.path.realpath(location)


def beside(location):
    return Path(f"{resolved(location)}.new")


def put_in_place(built, location):
    shutil.rmtree(resolved(location))
    os.replace(built, resolved(location))


def recover(location):
    pass
