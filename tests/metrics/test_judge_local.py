"""A judge on this machine: a random LLaVA of a few thousand weights, which says one thing whatever it is shown."""

import functools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sciflow_hf.errors import SciflowError
from sciflow_hf.metrics.judge import judge as judge_module
from sciflow_hf.metrics.judge.answers import NoAnswerError, Question
from sciflow_hf.metrics.judge.arguments import JudgeArguments
from sciflow_hf.metrics.judge.judge import Judge
from sciflow_hf.metrics.judge.local import LocalModel

GOOD = '{"errors": [{"d": "Garbled: label", "s": "critical"}], "broken": false}'
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
)
WORDS = [GOOD, "<image>", "<unk>", "Which", "texts", "are", "missing?", "You", "check."]
QUESTION = Question(
    "text", "You check.", "Which texts are missing?", [Image.new("RGB", (9, 5), c) for c in ("red", "blue")]
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last norm is zero, so that all logits are equal and it says its first word, a good answer, to the end."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        images,
        fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=2,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1, vision_feature_layer=-1)
    network = LlavaForConditionalGeneration(config)
    network.model.language_model.norm.weight.data.zero_()
    folder = tmp_path_factory.mktemp("llava")
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_it_sees_both_images_and_its_answer_is_read(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = LocalModel(str(llava), max_new_tokens=2)
    seen = []
    generate = asked._network.generate
    monkeypatch.setattr(asked._network, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
    answer = asked(QUESTION)
    assert [tuple(error) for error in answer.errors] == [("Garbled: label", "critical")] and not answer.broken
    (inputs,) = seen
    assert inputs["do_sample"] is False and inputs["pixel_values"].shape == (2, 3, 8, 8)
    red, blue = inputs["pixel_values"].mean((2, 3))
    assert red[0] > red[2] and blue[2] > blue[0]  # the reference comes first
    assert inputs["input_ids"][0].tolist() == [7, 8, 1, 1, 1, 1, 1, 1, 1, 1, 3, 4, 5, 6]


def test_what_it_says_at_random_is_no_answer(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = LocalModel(str(llava), max_new_tokens=3)
    asked._network.model.language_model.norm.weight.data.fill_(1)
    asked._network.lm_head.weight.data[0] = 0
    with pytest.raises(NoAnswerError, match="no complete list of errors"):
        asked(QUESTION)


def test_as_a_reward(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "LocalModel", functools.partial(LocalModel, max_new_tokens=2))
    args = JudgeArguments(judge_backend="local", judge_model=str(llava), judge_cache_dir=str(tmp_path))
    drawn, given = [Image.new("RGB", (8, 8))], {"rubric_text": [json.dumps(["a", "b"])]}
    judge = Judge(args)
    assert judge(["a"], drawn, **given) == [0.5] and judge.calls == 1
    again = Judge(args)
    assert again(["a"], drawn, **given) == [0.5] and again.calls == 0


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SciflowError, match=r"`judge_model` .*no image-text model could be loaded"):
        LocalModel(str(tmp_path))
