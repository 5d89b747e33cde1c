"""Plain readings of whole stores, and of their files, for the tests of the store."""

import contextlib
import resource
import signal
from dataclasses import asdict
from pathlib import Path

from prep.store import open_store

GIGABYTE = 2**30


def everything(path):
    """All that a reader can get out of a store, in plain values."""
    store = open_store(path)
    out = {"root": {name: value for name, value in store.attrs.items() if name != "run"}}
    moments = store.moments
    out["sites"], out["skipped"] = moments.sites, moments.skipped
    for layer in moments:
        one = moments[layer]
        out[layer] = [one.kind, one.count, one.members, one.hash, one.shape, one.mean.tolist(), one.diagonal.tolist()]
        out[layer].append(_matrix(one))
        if one.sampled:
            priorities = one.data().sample.priorities
            out[layer] += [one.tokens.tolist(), priorities.tolist()]
        if (half := one.half) is not None:
            out[f"half of {layer}"] = [
                half.count,
                half.share,
                half.mean.tolist(),
                half.diagonal.tolist(),
                _matrix(half),
            ]
    for name, basis in store.bases.items():
        out[name] = [basis.method, basis.dtype, basis.model, basis.hash, basis.expected]
        for layer, one in basis.read().items():
            values = (one.U, one.S, one.P, one.spectrum)
            out[f"{name} {layer}"] = [asdict(one.record), *(value.double().tolist() for value in values)]
        for role in ("kept", "unseen"):
            out[f"{role} of {name}"] = {layer: values.tolist() for layer, values in basis.shares(role).items()}
    return out


def _matrix(one):
    return (one.output if one.kind == "output" else one.second_moment).tolist()


def place(store, layer, name):
    """Where an array of a layer's moments is: the array's path in the store, and the row; None where it has its own."""
    at = open_store(store).moments[layer].places[name]
    return f"moments/{at.path}", at.row


def files(path):
    return sorted(file for file in Path(path).rglob("*") if file.is_file())


def flip(raw, position, mask):
    return raw[:position] + bytes([raw[position] ^ mask]) + raw[position + 1 :]


@contextlib.contextmanager
def bounded(seconds=60, extra=GIGABYTE):
    """No more than a gigabyte of address space on top of what is there, and an end in any case."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
