"""A model somebody trained says the same words before and after what must not change it.

The text is what karpathy/llama2.c's own test expects of stories260K, greedily decoded.
"""

from __future__ import annotations

import pytest
import torch

from growth.expand import expand
from growth.prune import prune
from growth.stack import stack
from surgery.checkpoint import open_checkpoint

GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def stories(test_data):
    path = test_data / "weights" / "stories260K"
    if not path.is_dir():
        pytest.skip("no weights/stories260K in the extra test data")
    return path


def tell(path, tokens=60):
    """Greedy text from the empty prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    start = torch.tensor([[tokenizer.bos_token_id]])
    made = model.generate(start, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0], skip_special_tokens=True).strip()


def test_the_golden_text_is_told_before(stories):
    assert tell(stories).startswith(GOLDEN)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_the_golden_text_is_told_after_expand(blocks, stories, write):
    assert tell(write(expand(open_checkpoint(stories), blocks=blocks))) == tell(stories)


def test_the_golden_text_is_told_after_a_stack_by_the_identity(stories, write):
    assert tell(write(stack(open_checkpoint(stories), layers="0-4"))) == tell(stories)


def test_the_golden_text_is_told_after_stacking_and_pruning_back(stories, write):
    doubled = write(stack(open_checkpoint(stories), factor=2))
    assert tell(write(prune(open_checkpoint(doubled), layers="5-9"))) == tell(stories)


def test_a_stack_says_something_else(stories, write):
    assert tell(write(stack(open_checkpoint(stories), factor=2))) != tell(stories)
