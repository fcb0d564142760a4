"""Speech in rooms, against direct convolution."""

from __future__ import annotations

import numpy as np
import pytest

from mvat_dist.data.mixing import reverb

RANDOM = np.random.default_rng(0)


def noise(samples: int, scale: float = 0.1) -> np.ndarray:
    return (scale * RANDOM.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("direct", [0, 1, 40, 399])
def test_reverberation_is_a_convolution_with_the_direct_sound_at_lag_zero(direct):
    room = noise(400, 0.01)
    room[direct] = 0.8
    speech = noise(1500)
    expected = np.convolve(speech.astype(np.float64), room)[direct : direct + 1500]
    wet = reverb.reverberate(speech, room)
    np.testing.assert_allclose(wet, expected, atol=1e-6)
    assert wet.dtype == np.float32


def test_a_room_without_reflections_changes_nothing():
    room = np.zeros(300, np.float32)
    room[32] = -1.0
    speech = noise(1000)
    np.testing.assert_allclose(reverb.reverberate(speech, room), -speech, atol=1e-6)


def test_a_room_longer_than_the_segment():
    room = noise(5000, 1e-3)
    room[10] = 1.0
    assert reverb.reverberate(noise(700), room).shape == (700,)


@pytest.mark.parametrize("direct", [0, 37, 1500])
def test_the_target_keeps_as_much_of_the_room_as_asked_for(direct):
    room = noise(3000, 0.01)
    room[direct] = -0.7
    speech = noise(6000)
    wet = reverb.reverberate(speech, room)
    assert reverb.target(speech, wet, room, "reverberant") is wet
    np.testing.assert_allclose(reverb.target(speech, wet, room, "dry"), -0.7 * speech, rtol=1e-6)
    # 50 ms at 16 kHz are 800 samples, the direct sound among them; what precedes it is kept, too.
    kept = room.astype(np.float64)
    kept[direct + 800 :] = 0.0
    expected = np.convolve(speech.astype(np.float64), kept)[direct : direct + 6000]
    early = reverb.target(speech, wet, room, "early")
    np.testing.assert_allclose(early, expected, atol=2e-6)
    # What remains of the wet signal is the late part alone, and it comes 50 ms later.
    click = np.zeros(6000, np.float32)
    click[100] = 1.0
    wet = reverb.reverberate(click, room)
    late = wet - reverb.target(click, wet, room, "early")
    assert np.abs(late[: 100 + 800]).max() < 1e-6
    assert np.abs(late[100 + 800 :]).max() > 0.005


def test_a_room_shorter_than_its_early_part_is_all_early():
    room, speech = noise(500), noise(2000)
    wet = reverb.reverberate(speech, room)
    np.testing.assert_array_equal(reverb.target(speech, wet, room, "early"), wet)


@pytest.mark.parametrize(("t60", "drr_db"), [(0.2, -3.0), (0.5, 5.0), (1.0, 12.0)])
def test_a_synthetic_room_decays_as_it_says(t60, drr_db):
    response = reverb.SyntheticRoom(t60, drr_db, seed=3).impulse_response().astype(np.float64)
    assert reverb.direct_sound(response) == 0
    assert 10 * np.log10(response[0] ** 2 / np.sum(response[1:] ** 2)) == pytest.approx(drr_db, abs=1e-4)
    # Schroeder's backward integration: a line, of which T30 (ISO 3382-1) reads the slope from -5 to -35 dB.
    tail = response[1:]
    decay = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1] / np.sum(tail**2) + 1e-30)
    from_, to = (int(np.argmax(decay < level)) for level in (-5, -35))
    assert 2 * (to - from_) / 16_000 == pytest.approx(t60, rel=0.08)
    other = reverb.SyntheticRoom(t60, drr_db, seed=4).impulse_response()
    assert abs(np.corrcoef(response[33:], other[33:])[0, 1]) < 0.1
    assert np.array_equal(
        response.astype(np.float32), reverb.SyntheticRoom(t60, drr_db, 3).impulse_response()
    )


# Recorded when the code was written: the direct sound, the end of the gap, the tail from its first sample.
TAILS = {
    0: [1.0, 0.0, 0.05184916406869888, 0.0013237139210104942, 0.002329872455447912, -2.113993286911864e-05],
    2**32 - 1: [
        1.0,
        0.0,
        -0.050966210663318634,
        0.020460711792111397,
        -0.008908622898161411,
        -5.754211815656163e-05,
    ],
}


@pytest.mark.parametrize("seed", TAILS)
def test_a_synthetic_room_is_that_of_the_runs_of_yesterday(seed):
    """A change would give a cache's lessons, and every run that goes on, other speech."""
    response = reverb.SyntheticRoom(0.3, 4.0, seed).impulse_response()
    assert response.shape == (4833,)
    np.testing.assert_allclose(response[[0, 32, 33, 34, 1000, 4832]], TAILS[seed], rtol=1e-6)
