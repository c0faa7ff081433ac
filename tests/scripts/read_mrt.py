#!/usr/bin/env python3
"""Reads .mrt files, with nothing but format-spec.md to go by: the standard library and numpy.

    read_mrt.py FILE.mrt                     checks every digest, all padding and every section with a binary form
    read_mrt.py FILE.mrt --safetensors DIR   also unpacks every tensor and compares it, bit for bit, with DIR's
    read_mrt.py --vectors files.json         checks that each small file is refused at its step, and the valid one not

Section numbers are those of format-spec.md. The section `tokenizer` is checked by its digest only.
"""

import argparse
import hashlib
import json
import math
import os
import struct
import sys

import numpy as np

MAGIC = b"\x89MRT\r\n\x1a\n"
CHUNK = 4194304
FINGERPRINT = "a40bc8cdaa6a11ab7f6342b790426b82dd7585a020181d7aeb4eb2f28874c5f9"
KNOWN = {
    "tensor_table", "conversion_report", "generation", "chat_template", "origin", "tokenizer", "token_names",
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
}
STEPS = (
    "BadMagic HeaderTruncated UnsupportedVersion Truncated Overlong BadHeaderBytes UnsupportedFeatures BadChunkBytes "
    "TooManySections PrologueTooLarge PrologueOutsideFile RootMismatch UnexpectedRoot ReservedNotZero "
    "UnsupportedArchitecture BadConfig UnknownLayout BadArenaBytes BadSectionName DuplicateSection "
    "UnknownRequiredSection SectionTooLarge BadSectionBytes SectionMisplaced MissingSection BadArenaOffset BadFileBytes "
    "SectionDamaged TensorTableMismatch BadReport BadGeneration BadTokenizer ChunkDamaged PaddingNotZero"
).split()


class Refused(Exception):
    """A file breaks a rule: the error of section 13 and what is wrong."""

    def __init__(self, error, what=""):
        super().__init__(f"step {STEPS.index(error) + 1}, {error}: {what}")
        self.error, self.step = error, STEPS.index(error) + 1


def check(good, error, what=""):
    if not good:
        raise Refused(error, what)


def align(x, a):
    return -(-x // a) * a


def ceil_div(a, b):
    return -(-a // b)


def sha256(data):
    return hashlib.sha256(data).digest()


class Tensor:
    """A tensor of the arena (section 8); `parts` are (source, bias or None, columns)."""

    def __init__(self, name, kind, k, n, offset, parts):
        vector = 64 * ceil_div(n, 32)
        panels = 64 * (k + 1) * ceil_div(n, 32)
        self.name, self.kind, self.k, self.n, self.offset, self.parts = name, kind, k, n, offset, parts
        self.bytes = {1: vector, 2: panels, 3: 2 * panels}[kind]


def layout(c):
    """The arena's tensors, and names and shapes of the source tensors (section 8)."""
    h, i_size, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    a, b = c["num_heads"] * c["head_dim"], c["num_kv_heads"] * c["head_dim"]
    embed = ("model.embed_tokens.weight", (v, h))
    tensors, sources = [], []

    def add(name, kind, k, n, *parts):
        offset = tensors[-1].offset + tensors[-1].bytes if tensors else 0
        tensors.append(Tensor(name, kind, k, n, offset, [(s[0][0], s[1][0] if s[1] else None, s[0][1][0]) for s in parts]))

    if not c["tied"]:
        add("embedding", 2, h, v, (embed, None))
        sources.append(embed)
    for i in range(c["num_layers"]):
        at = f"model.layers.{i}."

        def source(name, *shape):
            sources.append((at + name, shape))
            return sources[-1]

        attn_norm = source("input_layernorm.weight", h)
        q = source("self_attn.q_proj.weight", a, h), source("self_attn.q_proj.bias", a)
        k = source("self_attn.k_proj.weight", b, h), source("self_attn.k_proj.bias", b)
        v_proj = source("self_attn.v_proj.weight", b, h), source("self_attn.v_proj.bias", b)
        o = source("self_attn.o_proj.weight", h, a)
        mlp_norm = source("post_attention_layernorm.weight", h)
        gate, up = source("mlp.gate_proj.weight", i_size, h), source("mlp.up_proj.weight", i_size, h)
        down = source("mlp.down_proj.weight", h, i_size)
        add(f"layers.{i}.attn_norm", 1, 1, h, (attn_norm, None))
        add(f"layers.{i}.qkv", 2, h, a + 2 * b, q, k, v_proj)
        add(f"layers.{i}.attn_out", 2, a, h, (o, None))
        add(f"layers.{i}.mlp_norm", 1, 1, h, (mlp_norm, None))
        add(f"layers.{i}.gate_up", 3, h, i_size, (gate, None), (up, None))
        add(f"layers.{i}.down", 2, i_size, h, (down, None))
    norm = ("model.norm.weight", (h,))
    head = embed if c["tied"] else ("lm_head.weight", (v, h))
    add("final_norm", 1, 1, h, (norm, None))
    add("lm_head", 2, h, v, (head, None))
    sources += [norm, head]
    return tensors, sources


def section_name(field):
    name = field.split(b"\0")[0]
    allowed = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-."
    good = name and not name.startswith(b".") and all(byte in allowed for byte in name)
    check(good and not field[len(name):].strip(b"\0"), "BadSectionName", repr(field))
    return name.decode("ascii")


class Mrt:
    """A file whose header, directory and chunk table have passed steps 1 to 27."""

    def __init__(self, file, expected_root=None):
        self.file = file
        actual = os.fstat(file.fileno()).st_size
        head = self.read(0, min(512, actual))
        check(head[:8] == MAGIC, "BadMagic")
        check(len(head) == 512, "HeaderTruncated")
        (major, minor, header_bytes, required, _, file_bytes, arena_offset, arena_bytes, section_count, chunk_bytes,
         architecture) = struct.unpack_from("<HHIQQQQQIII", head, 8)
        check(major == 1, "UnsupportedVersion")
        check(actual >= file_bytes, "Truncated", f"{actual} of {file_bytes} bytes")
        check(actual <= file_bytes, "Overlong", f"{actual} of {file_bytes} bytes")
        check(header_bytes == 512, "BadHeaderBytes")
        check(required == 0, "UnsupportedFeatures")
        check(chunk_bytes == CHUNK, "BadChunkBytes")
        check(section_count <= 64, "TooManySections")
        prologue_bytes = 512 + 96 * section_count + 32 * ceil_div(arena_bytes, CHUNK)
        check(prologue_bytes <= 67108864, "PrologueTooLarge")
        check(prologue_bytes <= actual, "PrologueOutsideFile")
        prologue = head + self.read(512, prologue_bytes - 512)
        check(len(prologue) == prologue_bytes, "PrologueOutsideFile")
        root = sha256(prologue[:160] + bytes(32) + prologue[192:])
        check(root == head[160:192], "RootMismatch")
        check(expected_root in (None, root.hex()), "UnexpectedRoot")
        entries = [prologue[512 + 96 * i:608 + 96 * i] for i in range(section_count)]
        flags, = struct.unpack_from("<I", head, 100)
        if minor == 0:
            check(flags & ~1 == 0 and not any(head[120:128]) and not any(head[192:512]), "ReservedNotZero", "header")
            for entry in entries:
                entry_flags, reserved = struct.unpack_from("<II", entry, 32)
                check(entry_flags & ~1 == 0 and reserved == 0 and not any(entry[88:96]), "ReservedNotZero", "directory")
        check(architecture == 1, "UnsupportedArchitecture")
        self.config = self.read_config(head, flags)
        check(head[128:160].hex() == FINGERPRINT, "UnknownLayout")
        self.tensors, self.sources = layout(self.config)
        size = self.tensors[-1].offset + self.tensors[-1].bytes
        check(arena_bytes == size, "BadArenaBytes", f"{arena_bytes}, not {size}")
        fixed = {"tensor_table": 96 * len(self.tensors), "conversion_report": 32 * len(self.sources), "generation": 128}
        self.sections, self.padding, end = {}, [], prologue_bytes
        for entry in entries:
            name = section_name(entry[:32])
            check(name not in self.sections, "DuplicateSection", name)
            entry_flags, _, offset, length = struct.unpack_from("<IIQQ", entry, 32)
            check(entry_flags & 1 == 0 or name in KNOWN, "UnknownRequiredSection", name)
            check(length <= 67108864, "SectionTooLarge", name)
            check(fixed.get(name, length) == length, "BadSectionBytes", name)
            check(offset == align(end, 64), "SectionMisplaced", name)
            self.padding.append((end, offset))
            self.sections[name] = (offset, length, entry[56:88])
            end = offset + length
        check("tensor_table" in self.sections, "MissingSection")
        check(arena_offset == align(end, 2097152), "BadArenaOffset")
        check(file_bytes == arena_offset + arena_bytes, "BadFileBytes")
        self.padding.append((end, arena_offset))
        self.root, self.arena_offset, self.arena_bytes = root, arena_offset, arena_bytes
        table = prologue[512 + 96 * section_count:]
        self.chunks = [table[at:at + 32] for at in range(0, len(table), 32)]

    def read(self, offset, count):
        return os.pread(self.file.fileno(), count, offset)

    @staticmethod
    def read_config(head, flags):
        names = ("hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim vocab_size "
                 "max_position_embeddings").split()
        c = dict(zip(names, struct.unpack_from("<8I", head, 68)), tied=bool(flags & 1))
        limits = [65536, 1048576, 1024, 1024, c["num_heads"], 512, 16777216, 134217728]
        for name, most in zip(names, limits):
            check((2 if name == "head_dim" else 1) <= c[name] <= most, "BadConfig", name)
        check(c["num_heads"] % c["num_kv_heads"] == 0, "BadConfig", "num_kv_heads")
        check(c["head_dim"] % 2 == 0, "BadConfig", "head_dim")
        c["rms_norm_eps"], c["rope_theta"] = struct.unpack_from("<dd", head, 104)
        check(1e-12 <= c["rms_norm_eps"] <= 1, "BadConfig", "rms_norm_eps")
        check(1 <= c["rope_theta"] <= 1e12, "BadConfig", "rope_theta")
        return c

    def section(self, name):
        offset, length, digest = self.sections[name]
        content = self.read(offset, length)
        check(sha256(content) == digest, "SectionDamaged", name)
        return content

    def check_everything(self):
        table = self.section("tensor_table")
        for i, t in enumerate(self.tensors):
            record = struct.pack("<64sIIIIQQ", t.name.encode(), t.kind, t.k, t.n, 0, t.offset, t.bytes)
            check(table[96 * i:96 * i + 96] == record, "TensorTableMismatch", t.name)
        # In this order, for that is how a model is used: defaults, report, the others.
        for name in ["generation", "conversion_report", *self.sections]:
            if name not in self.sections:
                continue
            content = self.section(name)
            if name == "generation":
                self.check_generation(content)
            elif name == "conversion_report":
                self.check_report(content)
            elif name == "tokenizer":
                self.check_tokenizer(content)
        for i, digest in enumerate(self.chunks):
            start = i * CHUNK
            chunk = self.read(self.arena_offset + start, min(CHUNK, self.arena_bytes - start))
            check(sha256(chunk) == digest, "ChunkDamaged", f"chunk {i}")
        for start, end in self.padding:
            check(not any(self.read(start, end - start)), "PaddingNotZero", f"bytes {start} to {end}")

    def check_report(self, content):
        for i, (name, shape) in enumerate(self.sources):
            dtype, reserved, *counts = struct.unpack_from("<IIQQQ", content, 32 * i)
            good = dtype in (1, 2, 3) and reserved == 0 and sum(counts) == math.prod(shape)
            check(good, "BadReport", name)

    def check_generation(self, content):
        flags, bos, temperature, top_p, min_p, penalty, _, count = struct.unpack_from("<IIffffII", content)
        stops = struct.unpack_from("<16I", content, 32)
        vocab = self.config["vocab_size"]
        good = (
            flags <= 3 and 0 <= temperature <= 100 and 0 < top_p <= 1 and 0 <= min_p <= 1 and 0 < penalty <= 100
            and count <= 16 and bos < vocab and all(stop < vocab for stop in stops[:count])
            and not any(stops[count:]) and (flags & 2 or bos == 0) and not any(content[96:])
        )
        check(good, "BadGeneration")

    def check_tokenizer(self, content):
        check(len(content) >= 64, "BadTokenizer", "shorter than its header")
        flags, words, digits, tokens, added, normalized, blocks, buckets, slots, _, texts = struct.unpack_from("<11I", content)
        good = (
            flags <= 1 and 1 <= words <= 3 and digits <= 2 and tokens <= 16776704 and 1 <= blocks <= 256
            and not any(content[44:64])
        )
        arrays = 4352 + 256 * blocks + 4 * 256 + 12 * (added + normalized) + 2 * buckets + 4 * slots + 6 * tokens + texts
        check(good and len(content) == 64 + arrays, "BadTokenizer")

    def unpack(self):
        """Yields (source name, FP16 bits as uint16 in the source's shape)."""
        shapes = dict(self.sources)
        for t in self.tensors:
            words = np.frombuffer(self.read(self.arena_offset + t.offset, t.bytes), "<u2")
            if t.kind == 1:
                yield t.parts[0][0], words[:t.n]
                continue
            panels = words.reshape(-1, t.k + 1, 32)
            groups = [panels] if t.kind == 2 else [panels[0::2], panels[1::2]]
            # Columns side by side: row 0 has the biases, row k + 1 the weights of input k.
            groups = [group.transpose(1, 0, 2).reshape(t.k + 1, -1) for group in groups]
            first = 0
            for i, (weight, bias, columns) in enumerate(t.parts):
                if t.kind == 3:
                    columns_of = groups[i][:, :columns]
                else:
                    columns_of = groups[0][:, first:first + columns]
                    first += columns
                yield weight, columns_of[1:].T.reshape(shapes[weight])
                if bias:
                    yield bias, columns_of[0]
                else:
                    assert not columns_of[0].any(), f"{weight} has biases"


def safetensors(directory):
    """name -> FP16 bits, converted as section 10 says: to nearest, ties to even."""
    tensors = {}
    for name in sorted(os.listdir(directory)):
        if not name.endswith(".safetensors"):
            continue
        with open(os.path.join(directory, name), "rb") as file:
            size, = struct.unpack("<Q", file.read(8))
            header, data = json.loads(file.read(size)), file.read()
        for tensor, info in header.items():
            if tensor == "__metadata__":
                continue
            start, end = info["data_offsets"]
            raw = data[start:end]
            if info["dtype"] == "BF16":
                values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float16)
            else:
                values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[info["dtype"]]).astype(np.float16)
            tensors[tensor] = values.view(np.uint16).reshape(info["shape"])
    return tensors


def check_vectors(path):
    import tempfile

    with open(path) as file:
        vectors = json.load(file)

    def write(file, base, bytes_, pieces):
        content = bytearray(base[:bytes_].ljust(bytes_, b"\0"))
        for at, digits in pieces:
            piece = bytes.fromhex(digits)
            content[at:at + len(piece)] = piece
        file.seek(0)
        file.truncate()
        file.write(content)
        file.flush()
        return bytes(content)

    with tempfile.TemporaryFile() as file:
        valid = vectors["valid"]
        base = write(file, b"", valid["bytes"], valid["pieces"])
        assert sha256(base).hex() == valid["sha256"]
        mrt = Mrt(file, valid["root"])
        mrt.check_everything()
        unpacked = {name: bits.astype("<u2").tobytes().hex() for name, bits in mrt.unpack()}
        assert unpacked == valid["tensors"]
        for vector in vectors["invalid"]:
            write(file, base, vector["bytes"], vector["pieces"])
            try:
                Mrt(file, vector.get("expected_root")).check_everything()
                found = None
            except Refused as refused:
                found = refused.error, refused.step
            if found != (vector["error"], vector["step"]):
                sys.exit(f"{vector['name']}: {found}, not {vector['error']}, step {vector['step']}")
    print(f"{path}: the valid file is read, {len(vectors['invalid'])} others are refused, each at its step")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--safetensors", metavar="DIR")
    parser.add_argument("--vectors", metavar="JSON")
    args = parser.parse_args()
    if args.vectors:
        check_vectors(args.vectors)
    if args.file:
        with open(args.file, "rb") as file:
            mrt = Mrt(file)
            mrt.check_everything()
            print(f"{args.file}: root {mrt.root.hex()}, {len(mrt.chunks)} chunks, all digests right")
            if args.safetensors:
                source, count = safetensors(args.safetensors), 0
                for name, bits in mrt.unpack():
                    if not np.array_equal(bits, source[name]):
                        sys.exit(f"{args.file}: {name} differs from {args.safetensors}")
                    count += 1
                assert count == len(mrt.sources)
                print(f"{args.file}: all {count} tensors are those of {args.safetensors}, bit for bit")


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        sys.exit(f"refused: {refused}")
