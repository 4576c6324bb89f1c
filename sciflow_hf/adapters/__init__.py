"""Adapters by PEFT: options, types, files and other programs' formats. May import `families`, `engines` and below."""
