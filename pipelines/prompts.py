"""Encodes prompts of any length and with weights, for the pipelines of SDXL.

Each chunk of a prompt (`pipelines.chunks`) is encoded alone, and the UNet attends to all of them in a row. As
in AUTOMATIC1111's web UI and in ComfyUI, the pooled output, which steers the whole picture, is the first
chunk's.

Weights are ComfyUI's (`comfy/sd1_clip.py`, `encode_token_weights`): a token's hidden state h becomes
e + weight * (h - e), where e is what the encoder gives at that place for the empty prompt. AUTOMATIC1111
takes weight * h and scales the whole to its former mean; SDXL's means lie near 0, where that is unstable.

A prompt of one chunk without weights gives the same bits as `encode_prompt` of diffusers. That is not called,
because it cuts the prompt and writes the rest of it into the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.chunks import Chunk, Chunked, Reader, chunked, readers_of

PENULTIMATE = 2
"""The layer whose output SDXL was trained on, counted from the last, which is 1 (as `clip_skip`)."""


class Conditions(NamedTuple):
    """What the calls of diffusers' pipelines take in place of prompts, under their names."""

    prompt_embeds: Tensor
    """[1, chunks * 77, widths of all encoders]."""
    negative_prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor
    """[1, width]."""
    negative_pooled_prompt_embeds: Tensor | None


@torch.no_grad()
def encode(
    pipeline: Any,
    prompt: str,
    negative: str | None,
    *,
    guided: bool = True,
    clip_skip: int | None = None,
) -> Conditions:
    """The prompts for a pipeline's call; the shorter one is filled with empty chunks.

    `guided`: whether the pipeline needs the negative one. Where that is None, it is zeros if the pipeline's
    config says so, else the empty prompt. `clip_skip` holds for both, as in web UIs.
    """
    readers, layer = list(readers_of(pipeline).values()), clip_skip or PENULTIMATE
    positive = chunked(prompt, readers)
    if not guided:
        embeds, pooled = _encoded(readers, positive, layer)
        return Conditions(embeds, None, pooled, None)
    zeros = negative is None and pipeline.config.force_zeros_for_empty_prompt
    other = Chunked((Chunk(),)) if zeros else chunked(negative or "", readers, "negative_prompt")
    count = max(len(positive.chunks), len(other.chunks))
    embeds, pooled = _encoded(readers, positive.padded(count), layer)
    if zeros:
        return Conditions(embeds, torch.zeros_like(embeds), pooled, torch.zeros_like(pooled))
    negative_embeds, negative_pooled = _encoded(readers, other.padded(count), layer)
    return Conditions(embeds, negative_embeds, pooled, negative_pooled)


class _Encoded(NamedTuple):
    embeds: Tensor
    pooled: Tensor


def _encoded(readers: Sequence[Reader], prompt: Chunked, layer: int) -> _Encoded:
    """Of several encoders, the states stand side by side; the pooled output is the only one there is."""
    from diffusers.utils.torch_utils import get_module_execution_device

    sides: list[Tensor] = []
    pooled = torch.empty(0)
    for index, (tokenizer, encoder) in enumerate(readers):
        chunks = (*prompt.chunks, Chunk()) if prompt.weighted else prompt.chunks
        rows = [chunk.row(index, tokenizer, readers[index].length) for chunk in chunks]
        ids = torch.tensor([row.ids for row in rows])
        out = encoder(ids.to(get_module_execution_device(encoder)), output_hidden_states=True)
        if not len(pooled) and out[0].ndim == 2:  # the encoder with a projection
            pooled = out[0][:1]
        states = out.hidden_states[-layer]
        if prompt.weighted:
            weights = torch.tensor([row.weights for row in rows[:-1]])
            states = _weighted(states[:-1], states[-1:], weights.to(states.device)[..., None])
        sides.append(states.reshape(1, -1, states.shape[-1]))
    return _Encoded(torch.cat(sides, dim=-1), pooled)


def _weighted(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """[chunks, 77, width]: computed in float32 and rounded once; where the weight is 1, the same bits."""
    moved = empty.float() + weights * (states.float() - empty.float())
    return torch.where(weights == 1.0, states, moved.to(states.dtype))
