"""How teacher targets are stored: bounds, exactness, and what rounding does to a student's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.config.schema import DistilConfig
from mvat_dist.config.sizes import Size
from mvat_dist.data.shards.codecs import encode_flac
from mvat_dist.data.shards.target_codec import CODECS, NORM_FLOOR, SegmentTargets, decode, encode, unit_step
from mvat_dist.losses.mvat import energy_map
from mvat_dist.losses.objective import Objective, prepare_targets
from mvat_dist.models.manner import Manner

KEYS = [("encoder", 1, "channel"), ("decoder", 1, "global"), ("decoder", 2, "local")]


def unit(values: np.ndarray) -> np.ndarray:
    exact = values.astype(np.float64)
    return exact / max(np.linalg.norm(exact), 1e-30)


def frames_of(given_maps: dict) -> dict:
    return {key: values.size for key, values in given_maps.items()}


def maps(seed: int, peakiness: float, frames: int = 3000) -> dict:
    """Non-negative, of very different scales and dynamics."""
    random = np.random.default_rng(seed)
    sizes = (frames, 4 * frames, frames // 7 + 1)
    return {
        key: (10.0 ** random.uniform(-4, 6) * random.gamma(1 / peakiness, size=size)).astype(np.float32)
        for key, size in zip(KEYS, sizes, strict=True)
    }


def test_fp32_is_exact() -> None:
    output = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    given_maps = maps(1, 3.0)
    back = decode(encode(SegmentTargets(given_maps, output), "fp32"), "fp32", frames_of(given_maps), 999)
    assert all(np.array_equal(back.maps[key], given_maps[key]) for key in KEYS)
    assert np.array_equal(back.output, output)


@given(st.integers(0, 10_000), st.floats(0.05, 200), st.integers(1, 2000))
def test_compact_keeps_within_a_step(seed: int, peakiness: float, frames: int) -> None:
    given_maps = maps(seed, peakiness, frames)
    back = decode(encode(SegmentTargets(given_maps, None), "compact"), "compact", frames_of(given_maps))
    step = unit_step(4 * frames)
    for key, values in given_maps.items():
        if np.linalg.norm(values) <= NORM_FLOOR:
            assert not back.maps[key].any()
            continue
        restored = back.maps[key].astype(np.float64) * step  # the whole numbers, in units of the step
        error = restored - unit(values)
        # A centre lies in its step, and of all places in it the mean has the least squared error.
        assert np.abs(error).max() <= step * (1 + 1e-4) + 1e-6
        assert np.linalg.norm(error) <= 0.5 * step * np.sqrt(values.size) * (1 + 1e-4) + 1e-6


@given(st.integers(0, 10_000), st.floats(0.05, 50))
def test_half_precision_keeps_the_direction(seed: int, peakiness: float) -> None:
    given_maps = maps(seed, peakiness)
    back = decode(encode(SegmentTargets(given_maps, None), "fp16"), "fp16", frames_of(given_maps))
    for key, values in given_maps.items():
        assert np.linalg.norm(unit(back.maps[key]) - unit(values)) < 5e-4 or values.max() < 1e-30


@pytest.mark.parametrize("codec", CODECS)
def test_silence_and_only_what_is_wanted(codec: str) -> None:
    silent = {key: np.zeros(50, np.float32) for key in KEYS}
    content = encode(SegmentTargets(silent, np.zeros(160, np.float32)), codec)
    back = decode(content, codec, {KEYS[0]: 50}, 160)
    assert list(back.maps) == KEYS[:1]
    assert not back.maps[KEYS[0]].any()
    assert not back.output.any()
    assert decode(content, codec, {}).output is None


@pytest.mark.parametrize("codec", ["compact", "fp16"])
def test_the_output_keeps_sixteen_bits_at_any_level(codec: str) -> None:
    for peak in (1e-4, 0.3, 7.0):
        output = (peak * np.sin(np.arange(4000) / 7)).astype(np.float32)
        back = decode(encode(SegmentTargets(maps(0, 1.0), output), codec), codec, {}, output.size)
        assert np.abs(back.output - output).max() <= 0.51 * peak / 32767


@pytest.mark.parametrize("codec", CODECS)
def test_equal_targets_give_equal_bytes(codec: str) -> None:
    assert encode(SegmentTargets(maps(3, 2.0), None), codec) == encode(
        SegmentTargets(maps(3, 2.0), None), codec
    )


def test_other_bytes_are_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 21))
    other = zstandard.ZstdCompressor().compress(safetensors.numpy.save({"x": np.zeros(3, np.float32)}))
    for content in (b"", b"not zstandard", bomb, other):
        with pytest.raises(ValueError, match=r"teacher targets|holds no"):
            decode(content, "compact", {KEYS[0]: 3}, limit=1 << 20)


def speechlike(seconds: float, seed: int) -> np.ndarray:
    """Syllables of a harmonic voice in noise."""
    random = np.random.default_rng(seed)
    time = np.arange(round(16_000 * seconds)) / 16_000
    pitch = np.cumsum(150 + 40 * np.sin(2 * np.pi * 2 * time)) / 16_000
    voice = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 4) * time), 0, 1)
    return (0.1 * voice * syllables + 0.02 * random.standard_normal(time.size)).astype(np.float32)


def test_compact_is_small_and_hardly_turns_the_gradient() -> None:
    """What the issue asks for: no larger than the FLAC of the audio, gradient cosine of at least 0.999."""
    torch.manual_seed(0)
    noisy = np.stack([speechlike(1.0, seed) for seed in range(2)])
    heard = torch.from_numpy(noisy)
    teacher, student = Manner(Size("base", 12)), Manner(Size("base", 6))
    with torch.no_grad():
        teacher(heard)  # in training mode, so that BatchNorm's statistics are those of speech
        teacher.eval()
        views = teacher(heard, return_views=True)[1]
    exact = {key: energy_map(feature) for key, feature in views.items()}
    packed = [
        encode(SegmentTargets({key: values[at].numpy() for key, values in exact.items()}, None), "compact")
        for at in range(2)
    ]
    audio = sum(len(encode_flac(np.round(clip * 32767).astype(np.int16))) for clip in noisy)
    assert sum(map(len, packed)) <= audio
    stored = [
        decode(content, "compact", {key: values.shape[1] for key, values in exact.items()})
        for content in packed
    ]
    rounded = {key: torch.from_numpy(np.stack([one.maps[key] for one in stored])) for key in exact}

    objective = Objective(DistilConfig(method="mvat"), student.size, teacher.size)
    gradients = []
    for said in (exact, rounded):
        prepared = prepare_targets(heard, 0.5 * heard, said)
        terms = objective(*student(heard, return_views=True), prepared)
        found = torch.autograd.grad(terms["mvat"], list(student.parameters()), allow_unused=True)
        gradients.append(torch.cat([one.flatten().double() for one in found if one is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) >= 0.999


def test_a_map_of_another_length_is_refused() -> None:
    given_maps = maps(2, 2.0)
    content = encode(SegmentTargets(given_maps, None), "compact")
    with pytest.raises(ValueError, match="not \\(2,\\)"):
        decode(content, "compact", {KEYS[0]: 2})


def test_kd_weight_counts_in_the_loss_and_leaves_the_terms() -> None:
    config = DistilConfig(method="mvat+output", weight=0.3, output_weight=0.7)
    network = Manner(Size("base", 6, depth=2, chunk=16)).eval()
    objective = Objective(config, network.size, network.size)
    torch.manual_seed(0)
    noisy, clean, said = 0.1 * torch.randn(3, 2, 4000)
    with torch.no_grad():
        estimate, views = network(noisy, return_views=True)
    other = {key: torch.rand(feature.shape[0], feature.shape[-1]) for key, feature in views.items()}
    prepared = prepare_targets(noisy, clean, other, said)
    for kd_weight in (0.0, 0.25, 1.0):
        terms = objective(estimate, views, prepared, kd_weight)
        expected = terms["enhance"] + kd_weight * (0.7 * terms["output"] + 0.3 * terms["mvat"])
        torch.testing.assert_close(terms["loss"], expected)
        assert terms["mvat"] > 0
        assert terms["output"] > 0
