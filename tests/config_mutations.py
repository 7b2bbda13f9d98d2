"""Ways to break config.json and the tokenizer of a folder of the published form."""

import math
from collections.abc import Callable

from folder_mutations import CONFIG, DEEP, Folder, Mutation


def configs() -> dict[str, Mutation]:
    """config.json as a whole, and field by field."""
    texts = {
        "null": b"null",
        "a list": b"[1]",
        "half": b'{"model_type": "unilip_intern',
        "deep": b'{"a":' * DEEP,
        "deep lists": b"[" * DEEP,
        "a BOM": b"\xef\xbb\xbf{}",
        "UTF-16": '{"model_type": "unilip_internvl"}'.encode("utf-16"),
        "a long number": b'{"n_query": ' + b"9" * 20_000 + b"}",
        "no object": b"{}",
    }
    found: dict[str, Mutation] = {
        f"config is {name}": lambda f, t=text: f.write(CONFIG, t) for name, text in texts.items()
    }
    fields = {
        "model_type": (None, 5, "llama", "unilip", ["unilip_internvl"]),
        "n_query": ("16", 16.5, True, -16, 0, 17, 10**12, [16], {}),
        "connect_layer": ("2", 2.5, True, 0, 3, 10**6, [2]),
        "unilip_factor": (None, "10.6", 0, -1, True, math.nan, math.inf, [10.6]),
        "image_token_id": (10**9, 10**30, -5, 0, "303", 303.5, 320, 302, 304),
        "pad_token_id": (10**9, -1, "279", True),
        "downsample_ratio": (0.25, "0.5", 0),
        "image_seq_length": (1, "256", 10**12),
        "vision_feature_layer": (-2, "last"),
        "vision_feature_select_strategy": ("full", 1),
        "projector_hidden_act": ("relu",),
        "dit_interpolation_scale": (-1, "1", math.nan),
        "text_config": ([], "qwen2", 5, True),
        "vision_config": ([], "internvl", 5, True),
        "speed": (1, None, {"a": 1}),
        "text_config.hidden_size": (10**9, 128, "64", 64.0, [64]),
        "text_config.num_hidden_layers": (10**6, 3, -1, "4"),
        "text_config.intermediate_size": (10**9, 64),
        "text_config.vocab_size": (10**9, 10**30, -1, 0, "320"),
        "text_config.num_attention_heads": (10**9, 0, 3, 8, -4, "4"),
        "text_config.num_key_value_heads": (10**9, 0, 3, 4),
        "text_config.head_dim": (32, "16"),
        "text_config.rope_theta": (0, -1, "1e6", math.nan),
        "text_config.rope_scaling": ("dynamic", [], {"type": "yarn"}, {"type": {}}, 2),
        "text_config.rms_norm_eps": (0, "1e-6", math.inf),
        "text_config.max_position_embeddings": (0, 10**12, "32768"),
        "text_config.hidden_act": ("relu", 5),
        "text_config.use_sliding_window": (True,),
        "text_config.model_type": ("llama",),
        "text_config.speed": (1,),
        "vision_config.hidden_size": (10**9, 128, "64"),
        "vision_config.image_size": (10**9, [448], [448, 224], "448", {}),
        "vision_config.patch_size": (16, [14, 16], 0),
        "vision_config.num_attention_heads": (0, 3, 10**9, "4"),
        "vision_config.layer_norm_eps": (0, "1e-6"),
        "vision_config.norm_type": ("rms_norm",),
        "vision_config.use_qk_norm": (True,),
        "vision_config.speed": (1,),
    }
    for name, wrong in fields.items():
        for value in wrong:
            found[f"{name} = {str(value)[:24]!r} {type(value).__name__}"] = _field(name, value)
    return found


def _field(name: str, value: object) -> Mutation:
    def change(folder: Folder) -> None:
        config = folder.json(CONFIG)
        section, _, field = name.rpartition(".")
        (config[section] if section else config)[field] = value
        folder.write_json(CONFIG, config)

    return change


def tokenizers() -> dict[str, Mutation]:
    def fast(data: bytes) -> Mutation:
        return lambda folder: folder.write("tokenizer.json", data)

    def put(name: str, change: Callable[[dict], object]) -> Mutation:
        def apply(folder: Folder) -> None:
            values = folder.json(name)
            change(values)
            folder.write_json(name, values)

        return apply

    def unsaid(token: str) -> Mutation:
        def apply(folder: Folder) -> None:
            put("added_tokens.json", lambda v: v.pop(token))(folder)
            put("tokenizer_config.json", lambda v: v.pop("added_tokens_decoder"))(folder)

        return apply

    found = {
        f"tokenizer.json is {text[:12]!r}": fast(text)
        for text in (b"", b"{}", b"null", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}')
    }
    found["tokenizer.json is deep"] = fast(b'{"a":' * DEEP)
    for text in (b"[]", b"null", b"{", b'{"a": "b"}', b'{"a": -1}', b'{"a": 1.5}', b'{"a": 0}'):
        found[f"vocab.json is {text!r}"] = lambda f, t=text: f.write("vocab.json", t)
    for text in (b"a", b"a b c", b"q\xff z", b"zzz yyy", b"\0\0"):
        found[f"merges.txt is {text!r}"] = lambda f, t=text: f.write("merges.txt", t)
    added, settings = "added_tokens.json", "tokenizer_config.json"
    for text in (b"[]", b"{", b'{"a": "b"}'):
        found[f"added_tokens.json is {text!r}"] = lambda f, t=text: f.write(added, t)
        found[f"tokenizer_config.json is {text!r}"] = lambda f, t=text: f.write(settings, t)
        found[f"special_tokens_map.json is {text!r}"] = lambda f, t=text: f.write(
            "special_tokens_map.json", t
        )
    found.pop('tokenizer_config.json is b\'{"a": "b"}\'')  # says nothing, breaks nothing
    found.pop('special_tokens_map.json is b\'{"a": "b"}\'')
    found["<img> at another id"] = put(added, lambda v: v.update({"<img>": 5}))
    found["two tokens at an id"] = put(added, lambda v: v.update({"[X]": v["<img>"]}))
    found["id beyond the vocabulary"] = put(added, lambda v: v.update({"[X]": 10**9}))
    found["one id too many"] = put(added, lambda v: v.update({"[X]": 320}))
    found["no <img>"] = unsaid("<img>")
    found["no <IMG_CONTEXT>"] = unsaid("<IMG_CONTEXT>")
    for value in ([], {"a": {}}, {"5": {}}, {"5": {"content": 5}}, {"5": "<img>"}):
        found[f"added_tokens_decoder {value}"] = put(
            settings, lambda v, value=value: v.update(added_tokens_decoder=value)
        )
    found.pop("added_tokens_decoder []")  # as if it were not there
    found["unknown end token"] = put(settings, lambda v: v.update(eos_token="<end>"))
    return found
