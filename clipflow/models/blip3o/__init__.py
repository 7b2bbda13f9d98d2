"""BLIP3-o: a language model whose queries condition a DiT over CLIP features."""
