"""Ways to break a folder of the published form, each one by name; tests load what is left.

A mutation is called with a `Folder`, whose files are hard links to those of a good one, and
replaces what it breaks. Every table below gives a mutation a name that says what is wrong.
"""

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DEEP = 200_000


class Folder:
    """A copy of a good folder that is to be broken."""

    def __init__(self, path: Path, good: Path) -> None:
        self.path = path
        path.mkdir()
        for file in good.iterdir():
            os.link(file, path / file.name)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes | str) -> None:
        """A new file: writing into the link would break the good folder, too."""
        self.remove(name)
        (self.path / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def json(self, name: str) -> dict:
        return json.loads(self.read(name))

    def write_json(self, name: str, values: object) -> None:
        self.write(name, json.dumps(values))

    def header(self) -> tuple[dict, bytes]:
        """(header, all bytes of tensors) of the weights."""
        data = self.read(WEIGHTS)
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    def write_header(self, header: object, tensors: bytes) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.write(WEIGHTS, struct.pack("<Q", len(text)) + text + tensors)

    def shards(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("model-*.safetensors"))


Mutation = Callable[[Folder], object]
LM = "model.language_model.embed_tokens.weight"
QUERIES = "model.latent_queries"
PARTS = (
    QUERIES,
    LM,
    "model.vision_tower.encoder.layers.1.mlp.fc2.weight",
    "model.multi_modal_projector.0.bias",
    "model.llm_connector.layers.0.self_attn.q_proj.bias",
    "model.dit.transformer_blocks.1.ff.conv_depth.weight",
    "model.vae_decoder.down_mlp.1.weight",
    "model.vae_decoder.decoder.up_blocks.5.0.attn.to_out.weight",
)
INFINITIES = {"NaN": 0x7FC0, "signaling NaN": 0x7F81, "infinity": 0x7F80, "-infinity": 0xFF80}


def truncations() -> dict[str, Mutation]:
    """The weights end too early, or too late."""

    def cut(place) -> Mutation:
        def change(folder: Folder) -> None:
            data = folder.read(WEIGHTS)
            end = 8 + int.from_bytes(data[:8], "little")
            folder.write(WEIGHTS, data[: place(end, len(data))])

        return change

    def grow(count: int) -> Mutation:
        return lambda folder: folder.write(WEIGHTS, folder.read(WEIGHTS) + b"\0" * count)

    found = {f"first {n} bytes": cut(lambda e, s, n=n: n) for n in (0, 1, 4, 7, 8, 9, 100)}
    found |= {f"header{n:+}": cut(lambda e, s, n=n: e + n) for n in (-100, -1, 0, 1, 2, 4096)}
    found |= {f"{p} %": cut(lambda e, s, p=p: s * p // 100) for p in (25, 50, 75, 99)}
    found |= {f"less {n}": cut(lambda e, s, n=n: s - n) for n in (1, 2, 8, 4096)}
    return found | {f"{n} more": grow(n) for n in (1, 8, 4096)}


def header_lengths() -> dict[str, Mutation]:
    def say(length) -> Mutation:
        def change(folder: Folder) -> None:
            data = folder.read(WEIGHTS)
            true, size = int.from_bytes(data[:8], "little"), len(data)
            folder.write(WEIGHTS, struct.pack("<Q", length(true, size)) + data[8:])

        return change

    fixed = (0, 1, 2, 8, 10**8 + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
    found = {f"header of {n}": say(lambda t, s, n=n: n) for n in fixed}
    found |= {f"header longer by {n}": say(lambda t, s, n=n: t + n) for n in (-8, -1, 1, 8)}
    return found | {f"header of the file{n:+}": say(lambda t, s, n=n: s + n) for n in (-8, 0, 8)}


def header_texts() -> dict[str, Mutation]:
    texts = {
        "nothing": b"",
        "spaces": b" " * 64,
        "half an object": b"{",
        "a list": b"[]",
        "null": b"null",
        "a number": b"5",
        "a text": b'"weights"',
        "no tensors": b"{}",
        "deep lists": b"[" * DEEP,
        "deep objects": b'{"a":' * DEEP,
        "not UTF-8": b'{"\xff": 1}',
        "a BOM": b"\xef\xbb\xbf{}",
        "zeros": b"\0" * 64,
        "python": b"__import__('os').abort()",
        "a long number": b'{"a": ' + b"9" * 20_000 + b"}",
        "a tensor that is a list": b'{"a": []}',
        "a tensor of nothing": b'{"a": {}}',
    }
    return {
        f"header is {name}": lambda f, t=text: f.write_header(t, f.header()[1])
        for name, text in texts.items()
    }


def entries() -> dict[str, Mutation]:
    """One tensor's line of the header is wrong."""

    def put(name: str, field: str, value) -> Mutation:
        def change(folder: Folder) -> None:
            header, tensors = folder.header()
            entry = header[name]
            found = value(entry[field]) if callable(value) else value
            header[name] = entry | {field: found}
            folder.write_header(header, tensors)

        return change

    shapes = {
        "turned": lambda shape: shape[::-1],
        "flat": lambda shape: [math.prod(shape)],
        "negative": lambda shape: [-n for n in shape],
        "fractions": lambda shape: [float(n) for n in shape],
        "one more": lambda shape: [*shape, 1],
        "none": [],
        "text": "64",
        "null": None,
        "huge": [2**40, 2**40],
        "above 64 bits": [2**70],
        "zero": [0, 64],
        "truth": [True, 64],
        "deep": [[64]],
    }
    dtypes = ("I8", "U8", "I16", "I32", "I64", "BOOL", "F64", "C64", "F8_E4M3", "F8_E5M2", "F32")
    offsets = {
        "turned": lambda at: at[::-1],
        "negative": lambda at: [at[0] - 10**9, at[1] - 10**9],
        "beyond": lambda at: [at[0] + 10**9, at[1] + 10**9],
        "huge": [0, 2**63],
        "shifted": lambda at: [at[0] + 2, at[1] + 2],
        "overlapping": lambda at: [at[0] - 2, at[1] - 2],
        "short": lambda at: [at[0], at[1] - 2],
        "empty": lambda at: [at[0], at[0]],
        "one": [0],
        "three": lambda at: [*at, at[1]],
        "text": ["0", "8"],
        "fractions": lambda at: [float(at[0]), float(at[1])],
        "null": None,
    }
    found = {f"shape {n}": put(LM, "shape", v) for n, v in shapes.items()}
    found |= {f"other dtype {n}": _as_bytes(LM, n) for n in dtypes if n != "F32"}
    found |= {f"dtype {n}": put(LM, "dtype", n) for n in (*dtypes, "bf16", "OBJECT", "", 5, None)}
    return found | {f"offsets {n}": put(LM, "data_offsets", v) for n, v in offsets.items()}


def _as_bytes(name: str, dtype: str) -> Mutation:
    """The tensor's bytes are those of numbers of another dtype; nothing else is wrong."""
    sizes = {"I16": 2, "I32": 4, "I64": 8, "F64": 8, "C64": 8}

    def change(folder: Folder) -> None:
        header, tensors = folder.header()
        first, last = header[name]["data_offsets"]
        count = (last - first) // sizes.get(dtype, 1)
        header[name] |= {"dtype": dtype, "shape": [count // 64, 64]}
        folder.write_header(header, tensors)

    return change


def names() -> dict[str, Mutation]:
    """Tensors are there under other names."""

    def rename(change: Callable[[str], str]) -> Mutation:
        def apply(folder: Folder) -> None:
            header, tensors = folder.header()
            renamed = {change(name): entry for name, entry in header.items()}
            folder.write_header(renamed, tensors)

        return apply

    def one(old: str, new: str) -> Mutation:
        return rename(lambda name: new if name == old else name)

    def without(begin: str) -> Mutation:
        def change(folder: Folder) -> None:
            header, tensors = folder.header()
            kept, data, end = {}, [], 0
            for name, entry in header.items():
                if name == "__metadata__" or name.startswith(begin):
                    continue
                first, last = entry["data_offsets"]
                data.append(tensors[first:last])
                kept[name] = entry | {"data_offsets": [end, end + last - first]}
                end += last - first
            folder.write_header(kept, b"".join(data))

        return change

    bias = "model.projector.bias"
    found = {
        "all unknown": rename(lambda name: f"other.{name}"),
        "one unknown": one(bias, "model.projector.offset"),
        "unknown module": one(bias, "model.discriminator.bias"),
        "no name": one(bias, ""),
        "line break": one(bias, "model.projector\n.bias"),
        "long name": one(bias, "x" * 10_000),
        "twice": lambda folder: _repeat(folder, LM),
        "twice after mapping": one(bias, QUERIES.removeprefix("model.")),
        "far layer": one(PARTS[2], PARTS[2].replace("layers.1.", "layers.999999.")),
        "first stage": rename(lambda name: name.replace("vae_decoder.decoder", "dcae.decoder")),
    }
    parts = ("model.dit.", "model.vae_decoder.", "model.vae_decoder.down_", LM, QUERIES, bias)
    parts += ("model.llm_connector.", "model.vision_tower.", "model.multi_modal_projector.")
    return found | {f"without {begin}": without(begin) for begin in parts}


def _repeat(folder: Folder, other: str) -> None:
    """The header has the queries twice, the second time with the line of `other`."""
    header, tensors = folder.header()
    text, entry = json.dumps(header), json.dumps(header[other])
    folder.write_header(f'{text[:-1]}, "{QUERIES}": {entry}}}'.encode(), tensors)


def harmless() -> dict[str, Mutation]:
    """Odd headers that can be read in one way only."""

    def more(folder: Folder) -> None:
        header, tensors = folder.header()
        header[LM]["code"] = "os.system"
        folder.write_header(header, tensors)

    return {"unknown entry": more, "the same line twice": lambda f: _repeat(f, QUERIES)}


def values() -> dict[str, Mutation]:
    """A weight of a good file is no number."""

    def put(name: str, bits: int, last: bool) -> Mutation:
        def change(folder: Folder) -> None:
            header, tensors = folder.header()
            first, end = header[name]["data_offsets"]
            at = end - 2 if last else first
            data = tensors[:at] + struct.pack("<H", bits) + tensors[at + 2 :]
            folder.write_header(header, data)

        return change

    kinds = list(INFINITIES.items())
    return {
        f"{kinds[i % 4][0]} in {name}": put(name, kinds[i % 4][1], last=i % 2 == 1)
        for i, name in enumerate(PARTS)
    }


def files(marker: Path) -> dict[str, Mutation]:
    """Files are missing, or are something else; `marker` is made by code that must not run."""

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    def torch_file(folder: Folder) -> None:
        import torch

        folder.remove(WEIGHTS)
        torch.save({"a": Payload()}, folder.path / WEIGHTS)

    def folder_named(name: str) -> Mutation:
        def change(folder: Folder) -> None:
            folder.remove(name)
            (folder.path / name).mkdir()

        return change

    def link(name: str, target: str) -> Mutation:
        def change(folder: Folder) -> None:
            folder.remove(name)
            (folder.path / name).symlink_to(target)

        return change

    def pipe(folder: Folder) -> None:
        folder.remove(WEIGHTS)
        os.mkfifo(folder.path / WEIGHTS)

    found: dict[str, Mutation] = {
        f"a pickle, protocol {p}": lambda f, p=p: f.write(WEIGHTS, pickle.dumps(Payload(), p))
        for p in (0, 2, 5)
    }
    found |= {
        "a torch file": torch_file,
        "a pipe": pipe,
        "a link to itself": link(WEIGHTS, WEIGHTS),
    }
    found["a link to nothing"] = link(WEIGHTS, "nowhere")
    found["a device"] = link(WEIGHTS, "/dev/zero")
    for name in (CONFIG, WEIGHTS, "vocab.json", "merges.txt"):
        found[f"no {name}"] = lambda f, n=name: f.remove(n)
        found[f"{name} is a folder"] = folder_named(name)
        found[f"{name} is empty"] = lambda f, n=name: f.write(n, b"")
    found["added_tokens.json is a folder"] = folder_named("added_tokens.json")
    return found


def others() -> dict[str, Mutation]:
    """Files that a published folder need not have."""
    found: dict[str, Mutation] = {}
    for name in ("preprocessor_config.json", "generation_config.json"):
        for text in (b"", b"[]", b"{", b"null", b"\xff", b'{"a":' * DEEP):
            found[f"{name} is {text[:8]!r} of {len(text)}"] = lambda f, n=name, t=text: f.write(
                n, t
            )
    picture = {"size": {"height": 448}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for wrong in ({"size": 10**9}, {"size": -1}, {"size": "x"}, {"image_std": [0.5, 0, 0.5]},
                  {"image_mean": [0.5]}, {"image_mean": 5}, {"resample": 99}):  # fmt: skip
        found[f"preprocessor {wrong}"] = lambda f, w=wrong: f.write_json(
            "preprocessor_config.json", picture | w
        )
    for wrong in ({"default_num_inference_steps": 10**9}, {"default_num_inference_steps": "x"},
                  {"default_guidance_scale": "x"}, {"default_solver": 5},
                  {"max_new_tokens": "x"}, {"max_new_tokens": -1}):  # fmt: skip
        found[f"generation {wrong}"] = lambda f, w=wrong: f.write_json("generation_config.json", w)
    return found


def indexes(outside: Path) -> dict[str, Mutation]:
    """Of a folder in several files; `outside` is a good shard that is not in it."""

    def owner(value) -> Mutation:
        def change(folder: Folder) -> None:
            index = folder.json(INDEX)
            index["weight_map"][LM] = value(folder) if callable(value) else value
            folder.write_json(INDEX, index)

        return change

    def whole(value: object) -> Mutation:
        return lambda folder: folder.write_json(INDEX, value)

    def linked(folder: Folder) -> None:
        name = folder.shards()[0]
        folder.remove(name)
        (folder.path / name).symlink_to(outside)

    def cut(part: int) -> Mutation:
        def change(folder: Folder) -> None:
            name = folder.shards()[part]
            data = folder.read(name)
            folder.write(name, data[: len(data) // 2])

        return change

    def swap(folder: Folder) -> None:
        first, second = folder.shards()[:2]
        data = folder.read(first)
        folder.write(first, folder.read(second))
        folder.write(second, data)

    bad = ("missing.safetensors", "../model.safetensors", "/etc/passwd", "..", ".", "", "a/b",
           "a\0b", "a\nb", "x" * 5000, 5, None, ["a"])  # fmt: skip
    found = {f"index names {str(name)[-30:]!r}": owner(name) for name in bad}
    found["index names a whole path"] = owner(str(outside))
    found["index names another shard"] = owner(lambda folder: folder.shards()[-1])
    for value in ([], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}, None):
        found[f"index is {value}"] = whole(value)
    found |= {
        "index is deep": lambda f: f.write(INDEX, b'{"weight_map":' * DEEP),
        "index is empty": lambda f: f.write(INDEX, b""),
        "index has one name more": lambda f: owner(f.shards()[0])(f) or _one_name_more(f),
        "no index": lambda f: f.remove(INDEX),
        "no first shard": lambda f: f.remove(f.shards()[0]),
        "no last shard": lambda f: f.remove(f.shards()[-1]),
        "a shard from outside": linked,
        "first shard cut": cut(0),
        "last shard cut": cut(-1),
        "shards swapped": swap,
    }
    return found


def _one_name_more(folder: Folder) -> None:
    index = folder.json(INDEX)
    index["weight_map"]["model.more"] = folder.shards()[0]
    folder.write_json(INDEX, index)
