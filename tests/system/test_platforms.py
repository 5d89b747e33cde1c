"""What is known of other systems: modules and functions that only Unix has are missed by nothing."""

import os
import sys
from contextlib import chdir

from kills import CONTEXT

# torch and the others look at sys.platform and would miss them on this system
HIDE = """
import os, sys
import datasets, peft, torch, transformers, zarr, filelock, safetensors.torch, scipy.linalg
import concurrent.futures.process, multiprocessing.pool
for name in [name for name in sys.modules if name.split(".")[0] == "prep"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "termios", "pwd", "grp", "readline"):
    sys.modules[name] = None
for name in ("sysconf", "sched_getaffinity", "O_NOFOLLOW", "O_NONBLOCK", "getuid", "fork", "statvfs"):
    if hasattr(os, name):
        delattr(os, name)
"""
IMPORT = """
import importlib, pkgutil
import prep, prep.cli, prep.store, prep.preprocess, prep.adapters
names = [module.name for part in (prep.store, prep.preprocess, prep.adapters)
         for module in pkgutil.walk_packages(part.__path__, part.__name__ + ".")]
assert len(names) > 60, names
for name in names:
    importlib.import_module(name)
assert all(getattr(prep, name) is not None for name in prep.__all__)
"""
MEMORY = """
import builtins
from prep.preprocess.memory import free_memory, peak_memory
opened = builtins.open
def without_proc(path, *args, **kwargs):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return opened(path, *args, **kwargs)
import io
io.open = builtins.open = without_proc
assert free_memory() > 10**8 and peak_memory() == 0
"""
STORE = """
from prep.store import create_store
from prep.store.lock import writer_lock
with writer_lock("s"):
    create_store("s", {"id": "0", "model": {"id": "m"}, "corpus": None, "options": None, "status": "complete"})
assert prep.open_store("s").status == "complete"
print(prep.info("s")["status"])
"""


def test_without_what_only_unix_has(tmp_path):
    """Every module is imported, a store is locked, written and read, and memory is asked for, in one process."""
    process = CONTEXT.Process(target=_run, args=(HIDE + IMPORT + STORE + MEMORY, str(tmp_path)))
    process.start()
    process.join()
    assert (process.exitcode, (tmp_path / "said").read_text()) == (0, "complete\n")


def _run(code, folder):
    with chdir(folder), open("said", "w", buffering=1) as sys.stdout:
        exec(code, {"__name__": "alone"})
    os._exit(0)  # what multiprocessing does at the end is not asked about
