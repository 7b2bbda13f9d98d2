"""CLIPFlowPipeline: text to image, editing, questions, classification and reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clipflow.models.unilip import Condition
from clipflow.pipelines.arguments import broadcast, listed, paired, positive
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.image_processor import postprocess
from clipflow.pipelines.language import LanguageCalls
from clipflow.pipelines.options import (
    Generators,
    SamplingOptions,
    StepEndCallback,
    check_output_type,
)
from clipflow.pipelines.output import CLIPFlowPipelineOutput, Pictures
from clipflow.pipelines.prompts import check_text
from clipflow.sampling import flow_schedule, sample


class CLIPFlowPipeline(LanguageCalls):
    """One model that draws, edits, answers, classifies and reconstructs.

    Calls follow the conventions of diffusers. Nothing here is trained: all calls run without
    gradients.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        """Draw pictures.

        Args:
            prompt: a text, or a list of them.
            negative_prompt: what to steer away from, one for all prompts or one for each.
            num_images_per_prompt: pictures of each prompt; they come out next to each other.
            num_inference_steps: solver steps; the model's default (20) when not given.
            guidance_scale: 1 is no guidance; the model's default (UniLIP: 4.5) when not given.
            solver: "dpmpp_2m" (default), "euler" or "heun" (two model calls a step).
            generator: one for the batch, or a list with one for each picture: then a list of
                prompts gives what one by one would.
            latents: noise to start from, [pictures, C, h, w].
            output_type: "pil", "np", "pt" or "latent" (as sampled).
            return_dict: False returns the tuple (images,).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after
                each step; may return such a dict with other latents.

        Raises:
            InputError: an empty prompt, or an option that cannot be.
        """
        prompts = [check_text("prompt", text) for text in listed(prompt)]
        negatives = broadcast("negative_prompt", negative_prompt, len(prompts))
        options = self.defaults.options(
            len(prompts) * positive("num_images_per_prompt", num_images_per_prompt),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback=callback_on_step_end,
        )
        positive_rows = [self.prompts.text_to_image(text) for text in prompts]
        null_rows = [self.prompts.text_to_image(text) for text in negatives]
        if options.guidance_scale == 1.0:
            null_rows = []
        # Equal texts go through the language model once; the null prompt is mostly one for all.
        texts = list(dict.fromkeys(null_rows + positive_rows))
        ids, mask = self.prompts.rows(texts, self.device)
        rows = [
            texts.index(text)
            for half in (null_rows, positive_rows)
            for text in half
            for _ in range(num_images_per_prompt)
        ]
        condition = _take(self.model.encode_condition(ids, mask), rows)
        return self._output(self._generate(condition, options), return_dict)

    @torch.no_grad()
    def edit(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        """Redraw pictures as told.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            prompt: the instruction, one for all pictures or one for each (a single picture may
                have several).

        The other arguments are those of `__call__`. Guidance steers away from the picture as it
        is, since the null prompt shows it too.

        Raises:
            InputError: a picture that cannot be read, an empty prompt, an impossible option.
        """
        images, prompts = paired(listed(image), listed(prompt))
        prompts = [check_text("prompt", text) for text in prompts]
        negatives = broadcast("negative_prompt", negative_prompt, len(prompts))
        options = self.defaults.options(
            len(prompts) * positive("num_images_per_prompt", num_images_per_prompt),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback=callback_on_step_end,
        )
        texts = [self.prompts.edit(text) for text in prompts]
        features = self._features(images)
        if options.guidance_scale != 1.0:
            texts = [self.prompts.edit(text) for text in negatives] + texts
            features = torch.cat([features, features])
        condition = self.model.encode_condition(*self.prompts.rows(texts, self.device), features)
        rows = [row for row in range(len(texts)) for _ in range(num_images_per_prompt)]
        return self._output(self._generate(_take(condition, rows), options), return_dict)

    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        """Draw pictures again from their CLIP features alone.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            output_type: "pil", "np", "pt" or "latent" (times `unilip_factor`, as sampled ones).
            return_dict: False returns the tuple (images,).

        Raises:
            InputError: a picture that cannot be read, an unknown output type.
        """
        check_output_type(output_type)
        latents = self.model.clip_down(self._features(listed(image)).float())
        scaled = latents * self.model.config.unilip_factor
        return self._output(self._pictures(scaled, output_type), return_dict)

    def _generate(self, condition: Condition, options: SamplingOptions) -> Pictures:
        """Sample one picture for each row, or pair of rows [null, cond], of `condition`."""
        schedule = flow_schedule(options.num_inference_steps, shift=self.model.config.flow_shift)
        noise = options.noise(self.model.latent_shape, self.device)
        with tqdm(total=len(schedule), **self._progress_bar_config) as bar:

            def after_step(step: int, timestep: int, latents: Tensor) -> Tensor | None:
                bar.update()
                if options.callback is None:
                    return None
                given = {"latents": latents}
                answer = options.callback(self, step, schedule.timesteps[step], given)
                return (answer or given).get("latents")

            latents = sample(
                lambda rows, times: self.model.dit(rows, times, condition.hidden, condition.mask),
                noise,
                schedule,
                solver=options.solver,
                guidance_scale=options.guidance_scale,
                model_dtype=self.dtype,
                callback=after_step,
            )
        return self._pictures(latents, options.output_type)

    def _pictures(self, latents: Tensor, output_type: str) -> Pictures:
        if output_type == "latent":
            return latents
        decoded = self.model.decode(latents.float() / self.model.config.unilip_factor)
        return postprocess(decoded, self.model.config.output_size, output_type)

    @staticmethod
    def _output(pictures: Pictures, return_dict: bool) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        return CLIPFlowPipelineOutput(images=pictures) if return_dict else (pictures,)


def _take(condition: Condition, rows: list[int]) -> Condition:
    return Condition(condition.hidden[rows], condition.mask[rows])
