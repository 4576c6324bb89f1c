"""LoRA files: names of layers (`names`), layers (`layers`), files of diffusers and PEFT (`plain`), others (`tools`)."""
