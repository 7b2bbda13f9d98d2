"""The built-in world: draw scenes, speak about them, read pictures back, check what they show."""

from clipflow.scenes.asking import (
    QUESTION_KINDS,
    check_answer,
    evaluation_questions,
    questions,
    sample_asked_scene,
    sample_question,
    sample_relation,
)
from clipflow.scenes.captions import caption, labels, same_description
from clipflow.scenes.check import check_prompt
from clipflow.scenes.detector import agrees, detect
from clipflow.scenes.edits import (
    EDIT_KINDS,
    Edit,
    check_edit,
    draw_edit,
    evaluation_edits,
    sample_edit,
)
from clipflow.scenes.prompts import (
    TAGS,
    Prompt,
    draw_scene,
    evaluation_prompts,
    make_prompt,
    plain_form,
    sample_prompted_scene,
)
from clipflow.scenes.renderer import render, render_batch
from clipflow.scenes.vocabulary import split_words, vocabulary
from clipflow.scenes.world import Scene, SceneObject, is_held_out, random_scene

__all__ = [
    "EDIT_KINDS",
    "QUESTION_KINDS",
    "TAGS",
    "Edit",
    "Prompt",
    "Scene",
    "SceneObject",
    "agrees",
    "caption",
    "check_answer",
    "check_edit",
    "check_prompt",
    "detect",
    "draw_edit",
    "draw_scene",
    "evaluation_edits",
    "evaluation_prompts",
    "evaluation_questions",
    "is_held_out",
    "labels",
    "make_prompt",
    "plain_form",
    "questions",
    "random_scene",
    "render",
    "render_batch",
    "same_description",
    "sample_asked_scene",
    "sample_edit",
    "sample_prompted_scene",
    "sample_question",
    "sample_relation",
    "split_words",
    "vocabulary",
]
