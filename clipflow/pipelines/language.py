"""What a pipeline does with words: it converses, answers questions about pictures, ranks labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clipflow.errors import InputError
from clipflow.models.language.token_sampling import Generators, TokenSampling, row_dice
from clipflow.pipelines.answers import Answer, AnswerEnd, make_answers, stop_texts, text_pieces
from clipflow.pipelines.arguments import is_list, listed, paired, positive
from clipflow.pipelines.conversation import Conversation, Messages, conversations_of
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.offload import LANGUAGE
from clipflow.pipelines.parts import PipelineParts
from clipflow.pipelines.prompts import LABEL_QUESTION
from clipflow.pipelines.readers import Detail
from clipflow.pipelines.understanding import label_log_likelihoods, label_trees

Text = str | list[str] | Iterator[str]
Ranking = list[tuple[str, float]]


class Choice(NamedTuple):
    """How answers are made: one call's options, checked."""

    sampling: TokenSampling
    end: AnswerEnd
    generator: Generators


class LanguageCalls(PipelineParts):
    """The calls of a pipeline that end in the language model."""

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        *,
        max_new_tokens: int | None = None,
        max_tiles: int | None = None,
        max_pixels: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        generator: Generators = None,
        stream: bool = False,
    ) -> Text:
        """Answer the last message of a conversation.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": ...}], the last one the
                user's; the content is a text or a list of {"type": "text", "text": ...} and, in a
                user's message, {"type": "image", "image": a path, PIL image, array or tensor}. Or
                a list of such conversations. The model's own system message begins one that has
                none; an empty one leaves it out.
            max_new_tokens: longest answer; the model's default when not given.
            max_tiles: a picture is seen as up to so many tiles of the model's size, by its shape,
                and once as a whole (UniLIP: 12); 1 squashes it into a single one. Families that
                see pictures at their own size have no tiles.
            max_pixels: larger pictures are reduced to so many pixels before they are seen
                (BLIP3-o: as many as its folder says). Families that cut tiles have `max_tiles`.
            temperature: 0 takes the likeliest token always; higher is more random.
            top_p: draw from the likeliest tokens that together have this probability.
            top_k: draw from so many of the likeliest tokens; 0 is all.
            repetition_penalty: above 1 makes tokens that were read or said less likely; the model's
                default when not given (1 is none).
            stop: texts before which an answer ends.
            generator: one for all conversations, or a list with one for each: then an answer does
                not depend on the conversations beside it.
            stream: yield pieces of text that join to the answer; a single conversation only.

        Returns:
            The answer; a list of answers to a list of conversations; an iterator if streamed.

        Raises:
            InputError: malformed messages, a picture that cannot be read, an option that cannot
                be, or a conversation too long for the model with its answer.
            SamplingError: the model made a logit that is not finite.
        """
        self.family.require("chat", self.model)
        conversations, several = conversations_of(messages, self.prompts.check)
        choice = self._choice(
            max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, generator
        )
        if stream and several:
            raise InputError(
                f"stream=True must have one conversation, got a list of {len(messages)}"
            )
        tiles = self.reader.chat_tiles if max_tiles is None else max_tiles
        detail = Detail(tiles, max_pixels)
        answers = self._answers(conversations, detail, choice, stream=stream)
        return answers[0] if isinstance(answers, list) and not several else answers

    def ask(
        self,
        image: ImageInput | Sequence[ImageInput],
        question: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        max_tiles: int | None = None,
        max_pixels: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        generator: Generators = None,
        stream: bool = False,
    ) -> Text:
        """Answer questions about pictures: `chat` with one picture and one question each.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            question: one for all pictures or one for each (a single picture may have several).
            max_tiles: as of `chat`, but 1 when not given, which is fast: the whole picture at the
                model's own size.
            max_pixels: as of `chat`.
            stream: yield pieces of text that join to the answer; a single question only.

        The other arguments are those of `chat`.

        Returns:
            The answer; a list of answers if either argument is a list; an iterator if streamed.

        Raises:
            InputError: a picture that cannot be read, an empty question, lists that do not match,
                or as `chat`.
        """
        self.family.require("ask", self.model)
        images, questions = paired(listed(image), listed(question))
        conversations = [
            Conversation.of_question(one, self.prompts.check("question", text))
            for one, text in zip(images, questions, strict=True)
        ]
        choice = self._choice(
            max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, generator
        )
        if stream and len(questions) != 1:
            raise InputError(f"stream=True must have one question, got {len(questions)}")
        tiles = self.reader.ask_tiles if max_tiles is None else max_tiles
        detail = Detail(tiles, max_pixels)
        answers = self._answers(conversations, detail, choice, stream=stream)
        several = is_list(image) or is_list(question)
        return answers[0] if isinstance(answers, list) and not several else answers

    def classify(
        self,
        image: ImageInput | Sequence[ImageInput],
        labels: Sequence[str],
        *,
        question: str = LABEL_QUESTION,
        max_pixels: int | None = None,
    ) -> Ranking | list[Ranking]:
        """Rank labels by the language model's likelihood of each as the answer to `question`.

        A label's score is the sum of its tokens' log-likelihoods, its end included; probabilities
        are the softmax of the scores over `labels`. Nothing is calibrated or divided by length.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            labels: at least one text.
            question: the labels are read as its answers.
            max_pixels: as of `chat`.

        Returns:
            [(label, probability)], likeliest first; a list of those for a list of pictures.

        Raises:
            InputError: a picture that cannot be read, no labels or an empty one.
        """
        self.family.require("classify", self.model)
        if isinstance(labels, str) or not labels:
            raise InputError(f"labels must be a list of at least one text, got {labels!r}")
        stop = self.reader.end_of_turn
        ids = [[*self.prompts.ids(self.prompts.check("label", text)), stop] for text in labels]
        self.prompts.check("question", question)
        trees = label_trees(ids)
        room = max(len(tree.tokens) for tree in trees)
        images = listed(image)
        rankings = []
        detail = Detail(self.reader.ask_tiles, max_pixels)
        count = self.reader.pictures_at_once(detail)
        for first in range(0, len(images), count):
            some = images[first : first + count]
            asked = [Conversation.of_question(image_, question) for image_ in some]
            with self.offload.running(LANGUAGE):
                reading = self.reader.read(asked, detail=detail, room=room)
                scores = label_log_likelihoods(reading, trees)
            for chances in scores.softmax(-1).tolist():
                pairs = zip(labels, chances, strict=True)
                rankings.append(sorted(pairs, key=lambda pair: -pair[1]))
        return rankings if is_list(image) else rankings[0]

    def _choice(
        self,
        max_new_tokens: int | None,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float | None,
        stop: str | Sequence[str] | None,
        generator: Generators,
    ) -> Choice:
        """The checked options of one call."""
        limit = self.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        end = AnswerEnd(
            tokens=frozenset({self.reader.end_of_turn, *self.defaults.eos_token_ids}),
            texts=stop_texts(stop),
            max_new_tokens=positive("max_new_tokens", limit),
        )
        if repetition_penalty is None:
            repetition_penalty = self.defaults.repetition_penalty
        sampling = TokenSampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
        )
        return Choice(sampling, end, generator)

    def _answers(
        self,
        conversations: Sequence[Conversation],
        detail: Detail,
        choice: Choice,
        *,
        stream: bool,
    ) -> list[str] | Iterator[str]:
        """The answer of each conversation, or the pieces of the single one's."""
        sampling, end, generator = choice
        dice = row_dice(None if sampling.greedy else generator, len(conversations))
        answers = [Answer(self.tokenizer, end) for _ in conversations]
        with self.offload.running(LANGUAGE):
            room = end.max_new_tokens
            reading = self.reader.read(conversations, detail=detail, room=room)
            steps = make_answers(reading, answers, sampling, dice)
            if stream:
                return text_pieces(answers[0], self.offload.while_running(LANGUAGE, steps))
            for _ in steps:
                pass
        return [answer.text for answer in answers]
