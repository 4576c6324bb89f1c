"""Fixtures of the families' tests: some follow from what a module has as `tiny` and `family`."""

import pytest
from family_steps import with_adapter
from trainings import make_args


@pytest.fixture(scope="module")
def pipeline(tiny):
    """The stock pipeline in the folder `tiny`."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return make_args(tmp_path_factory.mktemp("args"), weighting_scheme="none")


@pytest.fixture(scope="module")
def model(family):
    return with_adapter(family)


@pytest.fixture(scope="module")
def small_sources():
    """Sources of about 128 x 128 pixels instead of 1 megapixel, in the pipelines' own modules."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(96, 160), (128, 128), (160, 96)])
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 128 * 128)
        yield
