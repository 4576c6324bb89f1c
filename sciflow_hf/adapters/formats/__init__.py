"""LoRA files: of diffusers and PEFT, of kohya's tools and ComfyUI, and the names they use. May import `errors`."""
