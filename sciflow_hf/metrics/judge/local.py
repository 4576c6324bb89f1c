"""A judge on this machine: an image-text model of transformers, which answers without sampling."""

from typing import Any

from ...errors import SciflowError, first_line
from .answers import Question, read_answer
from .scoring import Answer

MAX_NEW_TOKENS = 2048


class LocalModel:
    """Asks a model of `AutoModelForImageTextToText`, one question at a time.

    Args:
        model: folder, or name on the Hub.
        max_new_tokens: of an answer, which is refused if it is cut off.
    """

    def __init__(self, model: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model, self.max_new_tokens, self.calls = model, max_new_tokens, 0
        try:
            self._processor = AutoProcessor.from_pretrained(model)
            self._network = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval()
        except (OSError, ValueError) as error:
            raise SciflowError(
                f"`judge_model` {model!r}: no image-text model could be loaded ({first_line(error)})."
            ) from error
        if getattr(self._processor, "chat_template", None) is None:
            raise SciflowError(f"`judge_model` {model!r}: its processor has no chat template, so it cannot be asked.")
        self._network.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, question: Question) -> Answer:
        """The answer to a question; its images are shown before its words.

        Raises:
            NoAnswerError: the text that the model writes holds no answer. Another try would give the same one.
        """
        import torch

        self.calls += 1
        pictures: list[dict[str, Any]] = [{"type": "image", "image": image} for image in question.images()]
        chat = [
            {"role": "system", "content": [{"type": "text", "text": question.system}]},
            {"role": "user", "content": [*pictures, {"type": "text", "text": question.request}]},
        ]
        inputs = self._processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._network.device, self._network.dtype)
        with torch.inference_mode():
            tokens = self._network.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return read_answer(self._processor.decode(new, skip_special_tokens=True))
