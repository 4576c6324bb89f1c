"""FLUX.1 Kontext [dev] (Black Forest Labs): FLUX.1 that edits one reference image, shown behind the noisy tokens."""

from typing import Any, ClassVar

from ..options import arguments
from .flux import Flux


@arguments
class FluxKontext(Flux):
    """FLUX.1 Kontext: `black-forest-labs/FLUX.1-Kontext-dev`, from a reference image or from text alone."""

    name: ClassVar[str] = "flux_kontext"
    task: ClassVar[str] = "image-to-image"
    max_sources: ClassVar[int] = 1
    exact_pipeline: ClassVar[bool] = True

    def pipeline_class(self) -> Any:
        """`FluxKontextPipeline`."""
        from diffusers import FluxKontextPipeline

        return FluxKontextPipeline

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """As the pipeline: the preferred resolution, of about 1 megapixel, whose aspect ratio is nearest.

        To the ratio of sides that are cut to multiples of `bucket_step`.
        """
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        step = self.bucket_step()
        aspect = (width // step) / (height // step)
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return height // step * step, width // step * step

    def check_source(self, height: int, width: int) -> str:
        """Refuses sides under `bucket_step`, of which the pipeline has no ratio."""
        step = self.bucket_step()
        return f"{height} x {width} pixels: a side is under {step}" if min(height, width) < step else ""

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """Also `max_area`: by itself the pipeline draws 1 megapixel, whatever size it is asked for."""
        return super().size_options(height, width) | {"max_area": height * width}
