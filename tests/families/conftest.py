"""Fixtures of the families' tests."""

import pytest


@pytest.fixture(scope="module")
def small_sources():
    """Sources of about 128 x 128 pixels instead of 1 megapixel, in the pipelines' own modules."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(96, 160), (128, 128), (160, 96)])
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 128 * 128)
        yield
