"""`make demo`: a real model, real text, two commands.

SmolLM2-135M is calibrated on the help topics that ship with Python and decomposed; the store stays in .cache/demo.zarr.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

from smollm2 import fetch

CACHE = Path(__file__).parents[1] / ".cache"
PREP = [sys.executable, "-m", "prep.cli"]


def main() -> None:
    """Fetch, calibrate, decompose, show; one line per stage with its time."""
    CACHE.mkdir(exist_ok=True)
    model, data, store = CACHE / "smollm2", CACHE / "topics.jsonl", CACHE / "demo.zarr"
    times = {}

    begun = time.monotonic()
    fetch(model)
    with data.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for _, text in sorted(topics.items()))
    times["fetch SmolLM2-135M"] = time.monotonic() - begun

    shutil.rmtree(store, ignore_errors=True)
    calibrate = ["covariance", "--model", str(model), "--data", str(data), "--num-sequences", "64", "--seq-len", "256"]
    for stage in (calibrate, ["decompose"], ["info"]):
        command = [*stage, "--store", str(store)]
        print("\n$ prep " + " ".join(command), flush=True)
        begun = time.monotonic()
        subprocess.run([*PREP, *command], check=True)
        times[f"prep {stage[0]}"] = time.monotonic() - begun

    print()
    for stage, seconds in times.items():
        print(f"{stage:20} {seconds:6.1f} s")


if __name__ == "__main__":
    main()
