"""Likelihoods of labels as answers to what the language model has read."""

# Shape suffixes: B = pictures, H = LM width, M = tokens of a tree, E = edges of it, V = vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipflow.models.language.reading import Reading

TREE_TOKENS = 512  # read beside each other after a prompt
LOGITS_AT_ONCE = 2**23  # numbers, in float64


@dataclass
class LabelTree:
    """Labels as a tree of tokens, so that what they begin with alike is read once.

    Node 0 is the end of the prompt, node k + 1 the token `tokens[k]` that follows node
    `parents[k]`. An edge is a token whose likelihood counts, with the node it follows; that of a
    label's last token leads to no node.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    edges: dict[tuple[int, int], int] = field(default_factory=dict)
    paths: list[list[int]] = field(default_factory=list)  # edges of each label
    _nodes: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, label: Sequence[int]) -> None:
        """Put in the token ids of one more label."""
        node, path = 0, []
        for count, token in enumerate(label, 1):
            path.append(self.edges.setdefault((node, token), len(self.edges)))
            if count < len(label):
                node = self._child(node, token)
        self.paths.append(path)

    def _child(self, node: int, token: int) -> int:
        if (node, token) not in self._nodes:
            self.tokens.append(token)
            self.parents.append(node)
            self._nodes[node, token] = len(self.tokens)
        return self._nodes[node, token]

    def ancestry(self) -> tuple[list[int], list[list[int]]]:
        """Of each token of the tree: how far it is from the prompt, and the tokens up to it."""
        above: list[list[int]] = []
        for place, parent in enumerate(self.parents):
            above.append([*(above[parent - 1] if parent else []), place])
        return [len(places) - 1 for places in above], above


def label_trees(labels: Sequence[Sequence[int]]) -> list[LabelTree]:
    """Trees of `labels`, in order, each of at most `TREE_TOKENS` tokens or of a single label."""
    trees: list[LabelTree] = []
    for label in labels:
        if not trees or len(trees[-1].tokens) + len(label) - 1 > TREE_TOKENS:
            trees.append(LabelTree())
        trees[-1].add(label)
    return trees


@torch.no_grad()
def label_log_likelihoods(reading: Reading, trees: Sequence[LabelTree]) -> Tensor:
    """Log-likelihood of each label as the whole answer to the prompts of `reading`.

    Args:
        reading: prompts, with room for the largest tree.
        trees: token ids of the labels, each ending with the end-of-turn token, so that "a red star"
            is not a mere beginning of a longer answer.

    Returns:
        [B, labels] float64 on the CPU: the sum over each label's tokens, not divided by length.
    """
    scores = []
    for tree in trees:
        edges = _edge_log_likelihoods(reading, tree).cpu()
        scores += [edges[:, path].sum(-1) for path in tree.paths]
    return torch.stack(scores, dim=1)


def _edge_log_likelihoods(reading: Reading, tree: LabelTree) -> Tensor:
    """[B, E] float64: how likely each edge's token follows its node."""
    states = reading.hidden[:, None]
    device = states.device
    if tree.tokens:
        depths, above = tree.ancestry()
        ancestors = torch.zeros(len(above), len(above), dtype=torch.bool)
        for place, places in enumerate(above):
            ancestors[place, places] = True
        tokens, depths = torch.tensor([tree.tokens, depths]).to(device)
        read = reading.tree(tokens, depths, ancestors.to(device))
        states = torch.cat([states, read], dim=1)
    nodes, tokens = torch.tensor(list(tree.edges)).T.to(device)
    scores = states.new_empty(len(states), len(tokens), dtype=torch.float64)
    at_once = max(1, LOGITS_AT_ONCE // (len(states) * reading.vocab_size))
    for first in range(0, states.shape[1], at_once):
        logits = reading.model.head(states[:, first : first + at_once]).float().double()
        here = (nodes >= first) & (nodes < first + at_once)
        place = nodes[here] - first
        total = logits.logsumexp(-1)[:, place]
        scores[:, here] = logits[:, place, tokens[here]] - total
    return scores
