"""Frames in few steps: the formulas of the steps and guidances, and rows that do not touch each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from demo.training import picture_bank
from handler import Worker
from lora.errors import LoraUnsupported
from pipelines.image import ImagePipeline
from pipelines.live import Frame, Guidance, LiveStream, Spec
from settings import DEMO_TINY_VAE
from tests.live.streams import PROMPT, picture

SPEC = Spec(64, 64, (20, 30, 40))


@pytest.fixture
def pipeline(demo_worker: Worker) -> ImagePipeline:
    return demo_worker.parts.pipeline


def begun(stream: LiveStream, number: int = 0, negative: str | None = "a blue square") -> Frame:
    conditions = stream.conditions(PROMPT, negative)
    return stream.begin(stream.encode(picture(number)), stream.noise(number), conditions)


def finished(stream: LiveStream, frame: Frame) -> Tensor:
    for _ in range(stream.spec.steps):
        stream.step([frame])
    return frame.latents


@torch.no_grad()
def by_hand(pipeline: ImagePipeline, guidance: Guidance, scale: float) -> Tensor:
    """The paper's own form: guidance of noises, then x0, then noise again."""
    base, stream = pipeline.base, LiveStream(pipeline, SPEC)
    kept = base.scheduler.alphas_cumprod
    times = torch.linspace(999, 19, 50).round().long()[[20, 30, 40]]
    sizes, noise = torch.tensor([[64.0, 64, 0, 0, 64, 64]]), stream.noise(0)
    conditions = LiveStream(pipeline, replace(SPEC, guidance=Guidance.FULL)).conditions(
        PROMPT, "a blue square"
    )
    source = stream.encode(picture(0))

    def predicted(x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": sizes}
        return base.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

    x, origin = kept[times[0]].sqrt() * source + (1 - kept[times[0]]).sqrt() * noise[:1], source
    for step, t in enumerate(times):
        a, b = kept[t].sqrt(), (1 - kept[t]).sqrt()
        eps = predicted(x, t, conditions.prompt_embeds, conditions.pooled_prompt_embeds)
        away = predicted(
            x, t, conditions.negative_prompt_embeds, conditions.negative_pooled_prompt_embeds
        )
        if guidance is Guidance.INITIALIZE and step == 0:
            origin = (x - b * away) / a
        if guidance in (Guidance.SELF, Guidance.INITIALIZE):
            away = (x - a * origin) / b
        if guidance is not Guidance.NONE:
            eps = away + scale * (eps - away)
        x = (x - b * eps) / a
        if step < 2:
            following = kept[times[step + 1]]
            x = following.sqrt() * x + (1 - following).sqrt() * noise[step + 1 : step + 2]
    return x


@pytest.mark.parametrize("guidance", list(Guidance))
def test_a_frame_is_what_the_papers_formulas_give(
    pipeline: ImagePipeline, guidance: Guidance
) -> None:
    stream = LiveStream(pipeline, replace(SPEC, guidance=guidance, guidance_scale=1.7))
    made, wanted = finished(stream, begun(stream)), by_hand(pipeline, guidance, 1.7)
    assert torch.allclose(made, wanted, atol=2e-3, rtol=1e-3)
    plain = by_hand(pipeline, Guidance.NONE, 1.0)
    assert (guidance is Guidance.NONE) == torch.allclose(made, plain, atol=1e-2)


@pytest.mark.parametrize("guidance", list(Guidance))
def test_frames_at_different_steps_share_a_batch(
    pipeline: ImagePipeline, guidance: Guidance
) -> None:
    stream = LiveStream(pipeline, replace(SPEC, guidance=guidance, guidance_scale=1.5))
    alone = [finished(stream, begun(stream, number)) for number in range(3)]
    frames = [begun(stream, number) for number in range(3)]
    stream.step([frames[0]])
    stream.step(frames[:2])
    stream.step(frames)
    stream.step(frames[1:])
    stream.step(frames[2:])
    for frame, wanted in zip(frames, alone, strict=True):
        assert frame.step == 3
        assert torch.allclose(frame.latents, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (Guidance.NONE, [(0, False), (1, False)]),
        (Guidance.SELF, [(0, False), (1, False)]),
        (Guidance.INITIALIZE, [(0, True), (0, False), (1, False)]),
        (Guidance.FULL, [(0, True), (1, True), (0, False), (1, False)]),
    ],
)
def test_residual_guidance_saves_forwards(
    pipeline: ImagePipeline, guidance: Guidance, rows: list[tuple[int, bool]]
) -> None:
    stream = LiveStream(pipeline, replace(SPEC, guidance=guidance))
    assert [tuple(row) for row in stream.rows([0, 1])] == rows


def test_models_that_predict_velocity_or_the_picture_draw_the_same_x0(
    pipeline: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LiveStream(pipeline, replace(SPEC, t_index=(30,)))
    wanted = finished(stream, begun(stream))
    unet, scheduler = pipeline.base.unet, pipeline.base.scheduler
    a, b, real = stream._a, stream._b, unet.forward
    for kind in ("v_prediction", "sample"):

        def as_kind(x: Tensor, *given: object, kind: str = kind, **more: object) -> tuple[Tensor]:
            x0 = (x - b * real(x, *given, **more)[0]) / a
            return (x0 if kind == "sample" else (a * x - x0) / b,)

        with monkeypatch.context() as patch:
            patch.setattr(unet, "forward", as_kind)
            patch.setitem(scheduler.config.__dict__, "prediction_type", kind)
            assert torch.allclose(finished(stream, begun(stream)), wanted, atol=1e-3)


def test_a_seed_and_a_picture_give_one_frame_and_text_needs_none(pipeline: ImagePipeline) -> None:
    stream = LiveStream(pipeline, SPEC)
    assert torch.equal(finished(stream, begun(stream)), finished(stream, begun(stream)))
    conditions = stream.conditions(PROMPT, None)
    from_text = [
        stream.decode(finished(stream, stream.begin(None, stream.noise(seed), conditions)))
        for seed in (1, 1, 2)
    ]
    assert from_text[0].size == (64, 64)
    assert from_text[0].tobytes() == from_text[1].tobytes() != from_text[2].tobytes()


def test_a_picture_of_any_size_is_cropped_to_the_streams(pipeline: ImagePipeline) -> None:
    stream = LiveStream(pipeline, Spec(96, 64, (40,)))
    for size in ((96, 64), (300, 20), (31, 200)):
        latents = stream.encode(Image.new("L", size, 128))
        assert latents.shape == (1, 4, 8, 12) and latents.dtype is torch.float32


def test_decoding_undoes_encoding_with_both_autoencoders(pipeline: ImagePipeline) -> None:
    drawn = Image.fromarray(picture_bank(1, seed=5)[0].permute(1, 2, 0).numpy())
    with pytest.MonkeyPatch.context() as patch:
        for tiny in (None, AutoencoderTiny.from_pretrained(DEMO_TINY_VAE, dtype=torch.float32)):
            patch.setattr(pipeline, "tiny_vae", tiny)
            stream = LiveStream(pipeline, SPEC)
            again = stream.decode(stream.encode(drawn))
            error = (as_numbers(again) - as_numbers(drawn)).abs().mean()
            assert error < 12, error  # of 255


def as_numbers(drawn: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).float()


@torch.no_grad()
def test_the_tiny_autoencoder_reads_and_writes_the_models_latents(pipeline: ImagePipeline) -> None:
    """A sample of the loss that its training told: 0.29 with the edges' weights."""
    tiny = AutoencoderTiny.from_pretrained(DEMO_TINY_VAE, dtype=torch.float32)
    vae = pipeline.base.vae
    pixels = picture_bank(48, seed=99).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert (tiny.encode(pixels).latents - latents).square().mean() < 0.12
    assert (tiny.decode(latents).sample - pixels).abs().mean() < 0.12
    files = sum(file.stat().st_size for file in DEMO_TINY_VAE.iterdir())
    assert files < 200_000


def test_a_model_for_masks_alone_is_refused(
    pipeline: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipeline.base.unet.config.__dict__, "in_channels", 9)
    with pytest.raises(LoraUnsupported, match="within masks only"):
        LiveStream(pipeline, SPEC)
