"""The parts of a BLIP3o-NEXT model, by the names of its parameters."""

# Part -> beginnings of the names of its parameters.
PARTS = {
    "language model": ("language_model.",),
    "lm_head": ("lm_head.",),
    "connector": ("diffusion_connector.",),
    "DiT": ("dit.",),
    "decoder": ("vae.",),
}
