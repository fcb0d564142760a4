"""Noises for the synthetic corpus, made of random numbers: steady, fluctuating and impulsive ones.

Each function takes a length in seconds and a random generator, and returns audio (T,) at `RATE` of about unit
RMS. No two recordings of a kind share samples or parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.signal import butter, fftconvolve, sosfilt

Signal = npt.NDArray[np.float64]
NoiseGenerator = Callable[[float, np.random.Generator], Signal]

RATE = 16_000


def coloured(seconds: float, random: np.random.Generator) -> Signal:
    """Gaussian noise with a power spectrum of f**-a, a from 0 (white) to 2 (brown)."""
    samples = int(seconds * RATE)
    spectrum = np.fft.rfft(random.standard_normal(samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 20.0)
    return _unit(np.fft.irfft(spectrum * frequency ** -random.uniform(0, 1), samples))


def hum(seconds: float, random: np.random.Generator) -> Signal:
    """Mains hum of 50 or 60 Hz with falling harmonics over a little hiss."""
    time = _time(seconds)
    base = random.choice([50.0, 60.0])
    tones = [
        random.uniform(0.3, 1) / number * np.sin(2 * np.pi * (base * number * time + random.random()))
        for number in range(1, 30)
    ]
    return _unit(_unit(np.sum(tones, axis=0)) + 0.1 * coloured(seconds, random))


def fan(seconds: float, random: np.random.Generator) -> Signal:
    """Broadband air with the tones and the slow beat of blades."""
    time = _time(seconds)
    blades = random.uniform(70, 160)
    air = _band(random.standard_normal(time.size), 80, random.uniform(900, 2500))
    tones = np.sum(
        [np.sin(2 * np.pi * blades * k * time + random.uniform(0, 6)) / k**1.5 for k in range(1, 7)], axis=0
    )
    beat = 1 + 0.25 * np.sin(2 * np.pi * random.uniform(0.3, 2) * time)
    return _unit(beat * (_unit(air) + random.uniform(0.1, 0.4) * tones))


def wind(seconds: float, random: np.random.Generator) -> Signal:
    """Low-pitched noise in gusts."""
    air = _band(random.standard_normal(int(seconds * RATE)), 30, random.uniform(250, 700))
    return _unit(air * np.exp(1.2 * _slow(seconds, random.uniform(0.3, 0.8), random)))


def rain(seconds: float, random: np.random.Generator) -> Signal:
    """Thousands of short drops over a wash of noise."""
    drops = _events(seconds, random.uniform(300, 1500), random)
    drop = np.exp(-np.arange(int(0.004 * RATE)) / (0.0008 * RATE)) * random.standard_normal(int(0.004 * RATE))
    wash = _band(random.standard_normal(drops.size), 1000, 7000)
    return _unit(_unit(fftconvolve(drops, drop)[: drops.size]) + random.uniform(0.3, 0.8) * _unit(wash))


def traffic(seconds: float, random: np.random.Generator) -> Signal:
    """A rumble, with vehicles that pass every few seconds."""
    time = _time(seconds)
    passing = 0.2 * np.ones(time.size)
    for _ in range(max(1, int(seconds / 4))):
        centre, width = random.uniform(0, seconds), random.uniform(0.6, 2)
        passing += random.uniform(0.5, 1.5) * np.exp(-0.5 * ((time - centre) / width) ** 2)
    rumble = _unit(_band(random.standard_normal(time.size), 40, 300))
    tyres = _unit(_band(random.standard_normal(time.size), 400, 3000))
    return _unit(passing * (rumble + random.uniform(0.2, 0.6) * tyres))


def engine(seconds: float, random: np.random.Generator) -> Signal:
    """Harmonics of a motor whose speed wanders."""
    speed = random.uniform(25, 60) * np.exp(0.25 * _slow(seconds, 0.3, random))
    phase = 2 * np.pi * np.cumsum(speed) / RATE
    tones = np.sum(
        [random.uniform(0.2, 1) / k * np.sin(k * phase + random.uniform(0, 6)) for k in range(1, 40)], axis=0
    )
    return _unit(_unit(tones) + 0.2 * coloured(seconds, random))


def typing(seconds: float, random: np.random.Generator) -> Signal:
    """Key strokes in bursts: two clicks each, ringing at the pitch of their key, over a quiet room."""
    samples = int(seconds * RATE)
    strokes = np.zeros(samples)
    at = random.uniform(0, 0.3)
    while at < seconds:
        for delay, strength in ((0.0, 1.0), (random.uniform(0.06, 0.12), 0.5)):
            click = strength * _click(random.uniform(800, 4500), random.uniform(0.002, 0.008), random)
            start = int((at + delay) * RATE)
            strokes[start : start + click.size] += click[: max(0, samples - start)]
        at += random.uniform(0.08, 0.3) if random.random() < 0.9 else random.uniform(0.6, 1.5)
    return _unit(_unit(strokes) + 0.03 * coloured(seconds, random))


def fire(seconds: float, random: np.random.Generator) -> Signal:
    """Crackles of all sizes over a soft roar."""
    cracks = _events(seconds, random.uniform(8, 25), random)
    cracks *= random.pareto(2.5, cracks.size)
    crack = _click(random.uniform(1500, 4000), 0.003, random)
    roar = _band(random.standard_normal(cracks.size), 60, 400)
    return _unit(_unit(fftconvolve(cracks, crack)[: cracks.size]) + 0.4 * _unit(roar))


def siren(seconds: float, random: np.random.Generator) -> Signal:
    """A tone that sweeps up and down, with two overtones, over street noise."""
    time = _time(seconds)
    sweep = np.sin(2 * np.pi * random.uniform(0.2, 3) * time)
    frequency = random.uniform(600, 900) * 2 ** (random.uniform(0.3, 0.6) * sweep)
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    tones = np.sum([np.sin(k * phase) / k**2 for k in (1, 2, 3)], axis=0)
    return _unit(tones + 0.3 * traffic(seconds, random))


def birds(seconds: float, random: np.random.Generator) -> Signal:
    """Chirps of a few birds, each gliding in pitch, over a faint breeze."""
    samples = int(seconds * RATE)
    song = np.zeros(samples)
    for _ in range(int(seconds * random.uniform(2, 4))):
        length = int(random.uniform(0.05, 0.25) * RATE)
        glide = np.linspace(random.uniform(2000, 6000), random.uniform(2000, 6000), length)
        chirp = np.hanning(length) * np.sin(2 * np.pi * np.cumsum(glide) / RATE) * random.uniform(0.2, 1)
        start = int(random.integers(samples))
        song[start : start + length] += chirp[: samples - start]
    return _unit(_unit(song) + 0.1 * wind(seconds, random))


def water(seconds: float, random: np.random.Generator) -> Signal:
    """A stream: bands of noise, each with a flutter of its own."""
    parts = [
        _unit(_band(random.standard_normal(int(seconds * RATE)), low, 1.6 * low))
        * np.exp(0.7 * _slow(seconds, random.uniform(4, 12), random))
        for low in random.uniform(200, 4000, size=8)
    ]
    return _unit(np.sum(parts, axis=0))


GENERATORS: dict[str, NoiseGenerator] = {
    generator.__name__: generator
    for generator in (coloured, hum, fan, wind, rain, traffic, engine, typing, fire, siren, birds, water)
}


def _time(seconds: float) -> Signal:
    return np.arange(int(seconds * RATE)) / RATE


def _unit(signal: Signal) -> Signal:
    """Zero mean, RMS 1; a short signal in which nothing happens stays silent."""
    centred: Signal = signal - signal.mean()
    return np.asarray(centred / max(np.sqrt(np.mean(centred**2)), 1e-12))


def _band(signal: Signal, low: float, high: float) -> Signal:
    return np.asarray(sosfilt(butter(2, [low, min(high, 7500)], "bandpass", fs=RATE, output="sos"), signal))


def _slow(seconds: float, hertz: float, random: np.random.Generator) -> Signal:
    """A random curve of unit RMS that changes about `hertz` times a second."""
    knots = random.standard_normal(int(seconds * hertz) + 3)
    return np.interp(_time(seconds) * hertz, np.arange(knots.size), knots)


def _events(seconds: float, rate: float, random: np.random.Generator) -> Signal:
    """Impulses of random height, `rate` of them a second on average."""
    samples = int(seconds * RATE)
    return random.standard_normal(samples) * (random.random(samples) < rate / RATE)


def _click(hertz: float, decay: float, random: np.random.Generator) -> Signal:
    """A struck resonance that falls by 60 dB in about seven times `decay` seconds."""
    time = np.arange(int(7 * decay * RATE)) / RATE
    ring = np.sin(2 * np.pi * hertz * time) + 0.5 * random.standard_normal(time.size)
    return np.exp(-time / decay) * ring
