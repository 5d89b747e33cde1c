"""Attaching a stored basis against reading the same bytes, and against what PEFT recomputes at every start.

python benchmarks/attach.py --model MODEL --store prep.zarr --rank 64

attach        prep.attach, gain core, with and without the check of the weights
safetensors   a read of U, S and P of the same layers and rank from one safetensors file, with a copy into memory
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from load import LIMIT, kept, timed
from safetensors.torch import load_file, save_file

import prep
from prep.preprocess.model import loading as models


def main() -> None:
    """Alternate the three, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", default="prep.zarr")
    parser.add_argument("--basis", default="full")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peft-seconds", type=float, help="covariance + eigens of benchmarks/preprocess.py")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = models.load_model(options.model, dtype="float32")
    parts = prep.open_store(options.store).bases[options.basis].read(rank=options.rank)
    path = Path(tempfile.mkdtemp()) / "same.safetensors"
    tensors = {
        f"{name}.{role}": value.float().contiguous()
        for name, basis in parts.items()
        for role, value in (("U", basis.U.T), ("S", basis.S), ("P", basis.P))
    }
    save_file(tensors, path)

    def attach(verify: bool) -> None:
        prep.attach(net, options.store, core="gain", basis=options.basis, rank=options.rank, verify=verify)

    def read() -> None:
        for value in load_file(path).values():
            value.clone()

    samples: dict[str, list] = {"attach": [], "attach, verify=False": [], "safetensors": []}
    for _ in range(options.rounds + 1):
        samples["attach"].append(timed(lambda: attach(True)))
        prep.detach(net)
        samples["attach, verify=False"].append(timed(lambda: attach(False)))
        prep.detach(net)
        samples["safetensors"].append(timed(read))
    samples = {name: found[1:] for name, found in samples.items()}  # the first ones import and warm the page cache
    seconds = {name: statistics.median(kept(found)) for name, found in samples.items()}
    size = path.stat().st_size / 1e6
    print(f"{len(parts)} layers, rank {options.rank}, {size:.0f} MB")
    for name, value in seconds.items():
        drop = sum(sample.other > LIMIT for sample in samples[name])
        ratio = value / seconds["safetensors"]
        print(f"{name:22}{value:8.3f} s  {ratio:6.1f} x safetensors  ({drop} of {options.rounds} samples under load)")
    if options.peft_seconds:
        print(f"PEFT anew   {options.peft_seconds:8.1f} s  {options.peft_seconds / seconds['attach']:6.0f} x attach")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "megabytes": size}, indent=2) + "\n")


if __name__ == "__main__":
    main()
