"""What the language models of all families share: their layers, kept keys, choice of tokens."""
