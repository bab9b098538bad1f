"""Some layers of a linearized model; the weights of all others are never read."""

from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import TrainError
from surgery.evaluate.load import Loaded, Source, first_line, quiet
from surgery.linearize.comparing import decoder_of
from surgery.models.modeling_linearized import LinearizedForCausalLM


class Pass(nn.Module):
    """Stands for a layer that is not there: hidden states go by."""

    self_attn = None

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Shapes: [b, t, hidden] to the same."""
        return hidden_states


def load_part(
    source: Source,
    layers: range,
    *,
    embeddings: bool,
    device: torch.device,
    dtype: Any,  # noqa: ANN401 - torch's
) -> Loaded:
    """Load some layers, the last norm, and the embeddings if asked; `Pass` stands for the others.

    Layers keep their numbers, as masks and positions go by them.

    Raises:
        TrainError: transformers cannot load them, or tensors of theirs are missing.
    """
    try:
        with torch.device("meta"):
            whole = type(LinearizedForCausalLM(source.config))
        with quiet():
            model, info = _part_class(whole, layers, embeddings=embeddings).from_pretrained(
                source.path,
                config=source.config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
        model.to(device).eval()
    except Exception as error:  # transformers raises nearly any type, see `evaluate.load`
        fact = f"transformers cannot load layers {layers.start} to {layers.stop - 1}"
        raise TrainError(source.path, f"{fact} ({first_line(error)})") from error
    missing = sorted({*info["missing_keys"], *(k[0] for k in info["mismatched_keys"])})
    if missing:
        fact = f"tensors are missing, or of another shape: {', '.join(missing[:3])}"
        raise TrainError(source.path, fact, "mend the checkpoint")
    vocabulary = source.config.get_text_config(decoder=True).vocab_size
    return Loaded(
        path=source.path,
        model=model,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        embeddings=vocabulary,
        vocabulary=vocabulary,
    )


def _part_class(whole: type, layers: range, *, embeddings: bool) -> Any:  # noqa: ANN401
    """Return a class whose models have some layers alone; it is made before weights are read."""

    def post_init(self: Any) -> None:  # noqa: ANN401
        whole.post_init(self)  # type: ignore[attr-defined]
        decoder = decoder_of(self)
        for n in range(len(decoder.layers)):
            if n not in layers:
                decoder.layers[n] = Pass()
        self.lm_head = Pass()
        self.all_tied_weights_keys = {}  # the head is not there to be tied
        if not embeddings:
            decoder.embed_tokens = Pass()

    return type(whole.__name__, (whole,), {"__module__": whole.__module__, "post_init": post_init})
