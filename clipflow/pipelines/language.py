"""What a pipeline does with words: it answers questions about pictures and ranks labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from clipflow.errors import InputError
from clipflow.models.unilip.reading import Reading
from clipflow.pipelines.arguments import is_list, listed, paired, positive
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.offload import LANGUAGE
from clipflow.pipelines.parts import UniLIPParts
from clipflow.pipelines.prompts import LABEL_QUESTION, check_text
from clipflow.pipelines.understanding import (
    answer_text,
    greedy_tokens,
    label_log_likelihoods,
    label_trees,
    text_pieces,
)

Answer = str | list[str] | Iterator[str]
Ranking = list[tuple[str, float]]

PICTURES_AT_ONCE = 16


class LanguageCalls(UniLIPParts):
    """The calls of a pipeline that end in the language model."""

    def ask(
        self,
        image: ImageInput | Sequence[ImageInput],
        question: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        stream: bool = False,
    ) -> Answer:
        """Answer questions about pictures, by greedy decoding.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            question: one for all pictures or one for each (a single picture may have several).
            max_new_tokens: longest answer; the model's default when not given.
            stream: yield pieces of text that join to the answer; a single question only.

        Returns:
            The answer; a list of answers if either argument is a list; an iterator if streamed.

        Raises:
            InputError: a picture that cannot be read, an empty question, lists that do not match.
        """
        images, questions = paired(listed(image), listed(question))
        texts = [self.prompts.question(check_text("question", q)) for q in questions]
        limit = self.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        positive("max_new_tokens", limit)
        stop = self.model.config.tokens.im_end
        if stream and len(texts) != 1:
            raise InputError(f"stream=True must have one question, got {len(texts)}")
        with self.offload.running(LANGUAGE):
            tokens = greedy_tokens(self._read(images, texts, room=limit), stop, limit)
            if stream:
                tokens = self.offload.while_running(LANGUAGE, tokens)
                return text_pieces(self.tokenizer, tokens, stop)
            rows = zip(*tokens, strict=True)
        answers = [answer_text(self.tokenizer, [t for t in row if t != stop]) for row in rows]
        return answers if is_list(image) or is_list(question) else answers[0]

    def classify(
        self,
        image: ImageInput | Sequence[ImageInput],
        labels: Sequence[str],
        *,
        question: str = LABEL_QUESTION,
    ) -> Ranking | list[Ranking]:
        """Rank labels by the language model's likelihood of each as the answer to `question`.

        A label's score is the sum of its tokens' log-likelihoods, its end included; probabilities
        are the softmax of the scores over `labels`. Nothing is calibrated or divided by length.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            labels: at least one text.
            question: the labels are read as its answers.

        Returns:
            [(label, probability)], likeliest first; a list of those for a list of pictures.

        Raises:
            InputError: a picture that cannot be read, no labels or an empty one.
        """
        if isinstance(labels, str) or not labels:
            raise InputError(f"labels must be a list of at least one text, got {labels!r}")
        stop = self.model.config.tokens.im_end
        ids = [[*self.prompts.ids(check_text("label", text)), stop] for text in labels]
        text = self.prompts.question(check_text("question", question))
        trees = label_trees(ids)
        room = max(len(tree.tokens) for tree in trees)
        images = listed(image)
        rankings = []
        for first in range(0, len(images), PICTURES_AT_ONCE):
            some = images[first : first + PICTURES_AT_ONCE]
            with self.offload.running(LANGUAGE):
                reading = self._read(some, [text] * len(some), room=room)
                scores = label_log_likelihoods(reading, trees)
            for chances in scores.softmax(-1).tolist():
                pairs = zip(labels, chances, strict=True)
                rankings.append(sorted(pairs, key=lambda pair: -pair[1]))
        return rankings if is_list(image) else rankings[0]

    @torch.no_grad()
    def _read(self, images: Sequence[ImageInput], texts: Sequence[str], *, room: int) -> Reading:
        ids, mask = self.prompts.rows(texts, self.device)
        different = list({id(image): image for image in images}.values())
        places = {id(image): place for place, image in enumerate(different)}
        pictures = torch.tensor([places[id(image)] for image in images], device=self.device)
        features = self._features(different)
        return Reading(self.model, ids, mask, features, room=room, pictures=pictures)
