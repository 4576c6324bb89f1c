"""Pipelines of the networks that diffusers lacks; saved ones carry their code and load where this package is not."""
