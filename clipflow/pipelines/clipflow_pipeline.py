"""CLIPFlowPipeline: text to image, editing, questions, classification and reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clipflow.pipelines.arguments import broadcast, listed, paired, positive
from clipflow.pipelines.decoding import FeatureDecoding, ImageTokenSampling
from clipflow.pipelines.families.base import Conditions
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.image_processor import postprocess
from clipflow.pipelines.language import LanguageCalls
from clipflow.pipelines.options import (
    Generators,
    SamplingOptions,
    StepEndCallback,
    check_output_type,
    each_image,
)
from clipflow.pipelines.output import CLIPFlowPipelineOutput, Pictures, in_order
from clipflow.pipelines.sampler import Run
from clipflow.sampling import StepCache
from clipflow.sampling.plan import StepCallback


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
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        output_resolution: str = "model",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        batch_invariant: bool = False,
        tier: str | None = None,
        step_cache: StepCache | None = None,
        decoding: FeatureDecoding | None = None,
        image_tokens: ImageTokenSampling | None = None,
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        """Draw pictures.

        Args:
            prompt: a text, or a list of them.
            negative_prompt: what to steer away from, one for all prompts or one for each.
            num_images_per_prompt: pictures of each prompt; they come out next to each other.
            num_inference_steps: solver steps; the model's default (UniLIP: 20, BLIP3-o: 30) when
                not given.
            guidance_scale: 1 is no guidance; the model's default (UniLIP: 4.5, BLIP3-o: 3) when
                not given. One for all, or a list with one for each prompt or each picture.
            guidance_interval: (start, end), fractions of the steps; guidance is off outside, which
                halves the work there.
            solver: "dpmpp_2m" (UniLIP's default), "euler" (BLIP3-o's) or "heun" (two model calls a
                step).
            height, width: in pixels, multiples of the decoder's factor; the model's native size
                when neither is given. One for all or a list, as `guidance_scale`.
            generator: one for the batch, or a list with one for each picture: then a list of
                prompts gives what one by one would.
            latents: noise to start from, [pictures, C, h, w].
            output_type: "pil", "np", "pt" or "latent" (as sampled).
            output_resolution: "model" resizes pictures of native size as the model's authors do
                (UniLIP: 512 px decoded, 448 px handed out); "native" keeps what was decoded.
            return_dict: False returns the tuple (images,).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after
                each step; may return such a dict with other latents. Pictures of several sizes, or
                guided and unguided ones, are sampled in turn, and so reported.
            batch_invariant: sample each picture by itself, so that it has the very same bits alone
                and in any batch.
            tier: "faithful" or "fast"; the pipeline's own when not given.
            step_cache: a `FirstBlockCache` or `TaylorForecast`, to skip steps at some loss; the
                steps skipped are in the output. Pictures sampled together are skipped together.
            decoding: a `FeatureDecoding`, for models whose decoder is a diffusion model (BLIP3-o);
                its defaults when not given.
            image_tokens: an `ImageTokenSampling`, for models that draw image tokens (BLIP3o-NEXT).

        Raises:
            InputError: an empty prompt, or an option that cannot be.
            NotEnoughMemory: the pictures do not fit into memory together.
            SamplingError: the model made a latent that is not finite.
        """
        self.family.require("__call__", self.model)
        prompts = [self.prompts.check("prompt", text) for text in listed(prompt)]
        negatives = broadcast("negative_prompt", negative_prompt, len(prompts), self.prompts.check)
        options = self._options(
            len(prompts),
            num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            solver=solver,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            output_type=output_type,
            output_resolution=output_resolution,
            callback=callback_on_step_end,
            batch_invariant=batch_invariant,
            tier=tier,
            step_cache=step_cache,
            decoding=decoding,
            image_tokens=image_tokens,
        )
        conditions = self.family.encode(self, prompts, negatives, None, options)
        pictures, skipped = self.pictures(conditions, options)
        return self._output(pictures, return_dict, skipped)

    @torch.no_grad()
    def edit(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        output_resolution: str = "model",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        batch_invariant: bool = False,
        tier: str | None = None,
        step_cache: StepCache | None = None,
        decoding: FeatureDecoding | None = None,
        image_tokens: ImageTokenSampling | None = None,
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
        self.family.require("edit", self.model)
        images, prompts = paired(listed(image), listed(prompt))
        prompts = [self.prompts.check("prompt", text) for text in prompts]
        negatives = broadcast("negative_prompt", negative_prompt, len(prompts), self.prompts.check)
        options = self._options(
            len(prompts),
            num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            solver=solver,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            output_type=output_type,
            output_resolution=output_resolution,
            callback=callback_on_step_end,
            batch_invariant=batch_invariant,
            tier=tier,
            step_cache=step_cache,
            decoding=decoding,
            image_tokens=image_tokens,
        )
        pixels = self.image_processor(images)
        conditions = self.family.encode(self, prompts, negatives, pixels, options)
        pictures, skipped = self.pictures(conditions, options)
        return self._output(pictures, return_dict, skipped)

    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        resolution: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        """Draw pictures again from their CLIP features alone.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            resolution: side in pixels of the square that a picture is resized to; the model's own
                when not given. Multiples of the features' distance (UniLIP: 28 pixels) are seen as
                they are, others padded by reflection, and the margins are cut off what is drawn.
            output_type: "pil", "np", "pt" or "latent" (times `unilip_factor`, as sampled ones, and
                with the margins).
            return_dict: False returns the tuple (images,).

        Raises:
            InputError: a picture that cannot be read, an unknown output type, or a resolution that
                is too small to be padded.
            NotEnoughMemory: the pictures do not fit into memory at that resolution.
        """
        self.family.require("reconstruct", self.model)
        check_output_type(output_type)
        pictures = self.family.reconstruct(self, listed(image), resolution, output_type)
        return self._output(pictures, return_dict)

    def _options(
        self,
        prompts: int,
        images_per_prompt: int,
        *,
        num_inference_steps: int | None,
        guidance_scale: float | Sequence[float] | None,
        solver: str | None,
        height: int | Sequence[int] | None,
        width: int | Sequence[int] | None,
        tier: str | None,
        decoding: FeatureDecoding | None,
        image_tokens: ImageTokenSampling | None,
        **others: Any,
    ) -> SamplingOptions:
        """Checked options of one call; None takes the model's default."""
        own = {"decoding": decoding, "image_tokens": image_tokens}
        self.family.check_own(own, self.model)
        defaults = self.defaults
        count = (prompts, positive("num_images_per_prompt", images_per_prompt))
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        sides = zip(
            each_image("height", height, *count), each_image("width", width, *count), strict=True
        )
        return SamplingOptions(
            num_inference_steps=steps,
            guidance_scales=each_image("guidance_scale", scale, *count),
            sizes=tuple(self.family.picture_size(*pair, self.model.config) for pair in sides),
            solver=defaults.solver if solver is None else solver,
            tier=self.tier if tier is None else tier,
            **own,
            **others,
        )

    def sampling_options(
        self, pictures: int, *, generator: Generators, output_type: str
    ) -> SamplingOptions:
        """Of a call for `pictures` that leaves everything else at the model's defaults."""
        nothing = dict.fromkeys(
            ("num_inference_steps", "guidance_scale", "solver", "height", "width", "latents",
             "callback", "tier", "step_cache", "decoding", "image_tokens")
        )  # fmt: skip
        return self._options(
            pictures,
            1,
            **nothing,
            guidance_interval=(0.0, 1.0),
            generator=generator,
            output_type=output_type,
            output_resolution="model",
            batch_invariant=False,
        )

    def pictures(
        self, conditions: Conditions, options: SamplingOptions
    ) -> tuple[Pictures, tuple[tuple[int, ...], ...]]:
        """Sample a picture of each condition, and draw them.

        Returns:
            The pictures, and the skipped steps of each; none without a step cache.
        """
        dtype = getattr(torch, self.model.config.noise_dtype)
        noise = options.noise(self.model.config.latent_channels, self.device, dtype)
        runs = self.sampler.runs(options)
        total = len(runs) * options.num_inference_steps
        with tqdm(total=total, **self.progress) as bar:
            sampled = [
                self.sampler.latents(
                    run,
                    torch.stack([noise[sample] for sample in run.samples]),
                    conditions.null,
                    conditions.cond,
                    options,
                    callback=self._step_callback(options),
                    progress=bar.update,
                )
                for run in runs
            ]
        skipped = {
            sample: steps
            for run, (_, steps) in zip(runs, sampled, strict=True)
            for sample in run.samples
        }
        resize = options.output_resolution == "model"
        pictures = [
            self._pictures(latents, run, options, resize=run.size.native and resize)
            for run, (latents, _) in zip(runs, sampled, strict=True)
        ]
        return in_order(pictures, [run.samples for run in runs]), (
            () if options.step_cache is None else tuple(skipped[k] for k in sorted(skipped))
        )

    def _step_callback(self, options: SamplingOptions) -> StepCallback | None:
        if options.callback is None:
            return None

        def after_step(step: int, timestep: int, latents: Tensor) -> Tensor | None:
            given = {"latents": latents}
            answer = options.callback(self, step, torch.tensor(timestep), given)
            return (answer or given).get("latents")

        return after_step

    def _pictures(
        self, latents: Tensor, run: Run, options: SamplingOptions, *, resize: bool
    ) -> Pictures:
        if options.output_type == "latent":
            return latents
        drawn = self.family.draw(self, latents, run.size, options, options.dice(run.samples))
        size = self.model.config.output_size if resize else None
        return postprocess(drawn, size, options.output_type)

    @staticmethod
    def _output(
        pictures: Pictures, return_dict: bool, skipped: tuple[tuple[int, ...], ...] = ()
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        return CLIPFlowPipelineOutput(pictures, skipped) if return_dict else (pictures,)
