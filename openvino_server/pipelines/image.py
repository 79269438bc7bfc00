"""Text to image: OpenVINO GenAI's Text2ImagePipeline; Pillow writes the files."""

from __future__ import annotations

import io
import secrets
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import integer, number
from engine_plugin.services.pictures import IMAGE_FORMATS
from openvino_server.errors import RequestError
from openvino_server.pipelines import Job, OneAtATime, PipelineSettings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Served"]

_GRAIN = 8  # pixels for each value of the latent; the pipeline requires multiples
_SEEDS = 1 << 31


class Served(OneAtATime):
    """An image model. Made by `pipelines.load`."""

    def __init__(self, settings: PipelineSettings) -> None:
        import openvino_genai

        options = settings.options
        self._largest = _size(options.get("max_resolution") or "4096x4096", "max_resolution")
        size = options.get("default_resolution") or options.get("resolution")
        self._size = _size(str(size).split()[0], "default_resolution") if size else None
        self._most_images = int(options.get("max_num_images_per_prompt") or 10)
        self._steps = int(options.get("default_num_inference_steps") or 50)
        self._most_steps = int(options.get("max_num_inference_steps") or 100)
        self._pipeline = openvino_genai.Text2ImagePipeline(settings.path, settings.device, **settings.properties())
        config = self._pipeline.get_generation_config()
        self._own_size = (int(config.width), int(config.height))
        self.facts = {"capabilities": ["image"]}

    def run(self, job: Job) -> dict[str, Any]:
        request = job.request
        prompt = request["prompt"]
        count = integer(request, "n", 1, self._most_images) or 1
        steps = integer({"num_inference_steps": request.get("steps")}, "num_inference_steps", 1, self._most_steps)
        steps = steps or min(self._steps, self._most_steps)
        seed = integer(request, "seed", 0, (1 << 63) - 1)
        seed = secrets.randbelow(_SEEDS) if seed is None else seed
        form = request.get("format") or IMAGE_FORMATS[0]
        options = self._options(request) | {"num_inference_steps": steps, "num_images_per_prompt": 1}
        # One at a time: it takes less memory, and a cancel takes effect sooner.
        return {
            "images": [
                _written(self._one(job, prompt, index * steps, count * steps, seed + index, options), form)
                for index in range(count)
            ]
        }

    def _one(self, job: Job, prompt: str, before: int, total: int, seed: int, options: dict[str, Any]) -> Any:
        reported = 0

        def report(steps: int) -> None:
            nonlocal reported
            while reported < steps:
                reported += 1
                job.progress(before + reported, total)

        def after_step(step: int, _steps: int, _latent: object) -> bool:
            if not job.cancelled():
                report(step + 1)
            return job.cancelled()

        job.check()
        picture = self._pipeline.generate(prompt, rng_seed=seed, callback=after_step, **options)
        job.check()
        report(options["num_inference_steps"])  # GenAI drops the callbacks that wait when it has the picture
        return picture.data[0]

    def _options(self, request: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, default, most in zip(("width", "height"), self._size or self._own_size, self._largest, strict=True):
            side = options[name] = request.get(name) or default
            if not _GRAIN <= side <= most or side % _GRAIN:
                raise InvalidRequestError.at(
                    "size", f"{name} must be a multiple of {_GRAIN} from {_GRAIN} to {most}, not {side}"
                )
        guidance = number({"guidance_scale": request.get("guidance")}, "guidance_scale", 0, 100)
        if guidance is not None:
            options["guidance_scale"] = guidance
        if negative := request.get("negative_prompt"):
            if guidance is not None and guidance <= 1:
                raise InvalidRequestError.at("negative_prompt", "works only with a guidance_scale above 1")
            options["negative_prompt"] = negative
        return options


_SETTINGS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},  # the default takes ten times as long
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


def _written(pixels: np.ndarray[Any, np.dtype[np.uint8]], form: str) -> bytes:
    """The content of a picture's file, in one of IMAGE_FORMATS."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **_SETTINGS[form])
    return file.getvalue()


def _size(text: str, field: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise RequestError(f"{field}: must be WIDTHxHEIGHT, not {text!r}") from None
    return width, height
