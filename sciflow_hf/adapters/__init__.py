"""Adapters by PEFT: options, layers, files and formats of other programs. May import `families` and below."""
