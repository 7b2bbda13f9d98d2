"""The prompt that BLIP3o-NEXT draws from.

Source: specs of BLIP3o-NEXT section B.4: the tokenizer's own chat template, then the tokens that
begin a picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST = "Please generate image based on the following caption: {}"
PICTURE_BEGINS = "<im_start><S0>"
# In a caption these would be read as structure of the prompt.
RESERVED = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<im_start>", "<im_end>", "<image>")


def generation_prompt(
    caption: str, system_message: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> str:
    """The text whose continuation is the picture of `caption`.

    Args:
        caption: what is to be drawn.
        system_message: of the model's configuration.
        tokenizer: whose own chat template is used if it has one; otherwise ChatML, which is what
            Qwen3's template makes of these messages.
    """
    request = REQUEST.format(caption)
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        messages = [
            {"role": "system", "content": system_message},
            {"role": "user", "content": request},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + PICTURE_BEGINS
    turns = (("system", system_message), ("user", request))
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return f"{said}<|im_start|>assistant\n{PICTURE_BEGINS}"
