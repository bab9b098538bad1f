"""What a model writes."""

from contextlib import ExitStack
from pathlib import Path

from surgery.evaluate.load import find_device, find_dtype, load, open_source


def greedy(model: str | Path, prompt: str, *, new_tokens: int, device: str = "cpu") -> str:
    """Return the text that a model goes on with, always taking the likeliest token.

    Args:
        new_tokens: at most this many; fewer when the model ends its text.

    Raises:
        CheckpointError: the model or its tokenizer cannot be opened.
        TrainError: it does not load whole.
    """
    import torch

    place = find_device(device)
    with ExitStack() as scratch:
        source = open_source(model, scratch)
        loaded = load(source, device=place, dtype=find_dtype(None, place))
    tokens = source.tokenizer(prompt, return_tensors="pt").to(place)
    with torch.inference_mode():
        out = loaded.model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
    text: str = source.tokenizer.decode(
        out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text
