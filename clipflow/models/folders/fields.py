"""Reading a published config.json with types: what it may hold, and what it must be.

Fields that are neither the architecture's, nor transformers' own, nor training's notes are refused,
since one that changes the architecture would otherwise be ignored without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LARGEST = 2**31

# What transformers' PretrainedConfig writes into every object, old versions and new.
ANY = """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
"""


@dataclass(frozen=True)
class Schema:
    """The fields that the config.json of a family may have.

    Attributes:
        family: its name, for errors.
        known: path of an object ("" is the top, "text_config", ...) -> names of its fields.
        note_prefixes, note_suffixes: of names at the top that training leaves there: places of
            other models, the data, what was trained.
    """

    family: str
    known: Mapping[str, frozenset[str]]
    note_prefixes: tuple[str, ...] = ()
    note_suffixes: tuple[str, ...] = ()

    def knows(self, name: str, path: str) -> bool:
        """Whether the object at `path` may have the field `name`."""
        if name in self.known[path]:
            return True
        return not path and (
            name.startswith(self.note_prefixes) or name.endswith(self.note_suffixes)
        )


class Fields:
    """One JSON object of a config.json; a field that is null counts as missing.

    Raises:
        ValueError: from every method, in one line that names the field and what it must be; from
            the constructor, `values` is no object or has an unknown field.
    """

    def __init__(self, values: object, schema: Schema, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"config.json: {path} must be an object, got {shown(values)}")
        unknown = sorted(name for name in values if not schema.knows(str(name), path))
        self._values, self._schema = values, schema
        self._prefix = f"{path}." if path else ""
        if unknown:
            raise ValueError(
                f"config.json: must have the fields of a published {schema.family}, got "
                f"{self._prefix}{unknown[0][:80]!s}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
                + " (remove what does not change the architecture)"
            )

    def section(self, name: str) -> Fields:
        """The object called `name`, empty where it is missing."""
        found = self._values.get(name)
        return Fields({} if found is None else found, self._schema, self._prefix + name)

    def get(self, name: str) -> object:
        """The value as it is; None where it is missing."""
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        found = self._found(name, default, "a whole number above 0")
        if type(found) is not int or not 0 < found <= LARGEST:
            raise self._wrong(name, "a whole number above 0", found)
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        found = self._found(name, default, "a number above 0")
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise self._wrong(name, "a number above 0", found)
        return float(found)

    def agree(self, name: str, wanted: int) -> None:
        """The field, where it is there, must be `wanted`, which the tensors say."""
        found = self._values.get(name)
        if found is not None and (type(found) is not int or found != wanted):
            raise self._wrong(name, f"{wanted} as the weights are", found)

    def fixed(self, name: str, *wanted: object) -> None:
        """The field, where it is there, must be one of `wanted`: nothing else is implemented."""
        found = self._values.get(name)
        if found is not None and found not in wanted:
            raise self._wrong(name, " or ".join(map(repr, wanted)), found)

    def side(self, name: str, wanted: int) -> None:
        """A size in pixels, one number or [height, width], must be `wanted` where it is there."""
        found = self._values.get(name)
        pair = found if isinstance(found, list) else [found, found]
        if found is not None and not (len(pair) == 2 and all(v == wanted for v in pair)):
            raise self._wrong(name, f"{wanted} or [{wanted}, {wanted}] as the weights are", found)

    def _found(self, name: str, default: object, wanted: str) -> object:
        found = self._values.get(name)
        if found is None and default is None:
            raise self._wrong(name, wanted, "nothing")
        return default if found is None else found

    def _wrong(self, name: str, wanted: str, found: object) -> ValueError:
        got = found if found == "nothing" else shown(found)
        return ValueError(f"config.json: {self._prefix}{name} must be {wanted}, got {got}")


def shown(value: object) -> str:
    """`value` with its type, cut to a few characters."""
    if isinstance(value, list | Mapping):
        return f"{type(value).__name__} of {len(value)} entries"
    if isinstance(value, int) and abs(value) > 10**30:
        return "int above 10^30"  # text of it could be long, and take long
    return f"{type(value).__name__} {str(value)[:40]!r}"
