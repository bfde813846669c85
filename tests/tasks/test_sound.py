from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from recordings import wav_bytes, write_wav

from seqzoo.tasks import DataError
from seqzoo.tasks.sound import LEVELS, mean_and_std, read_recordings, read_wav

EXTREMES = np.array([-32768, -1, 0, 1, 32767], np.int16)


def test_samples_are_exact(tmp_path):
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    recordings = [EXTREMES, np.arange(100, dtype=np.int16), EXTREMES[:1]]
    for path, samples in zip(paths, recordings, strict=True):
        write_wav(path, samples, rate=8000)
    samples, offsets = read_recordings(paths, rate=8000, max_length=10)
    assert samples.dtype == np.int16
    assert samples.tolist() == [*EXTREMES, *range(10), -32768]
    assert offsets.tolist() == [0, 5, 15, 16]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"rate": 16000}, "1 channels, 16 bits, 16000 Hz; expected 1, 16 and 8000"),
        ({"rate": 8000, "channels": 2}, "2 channels, 16 bits, 8000 Hz; expected"),
        ({"rate": 8000, "width": 1}, "1 channels, 8 bits, 8000 Hz; expected"),
        ({"rate": 8000, "width": 3}, "1 channels, 24 bits, 8000 Hz; expected"),
    ],
)
def test_another_form(tmp_path, form, message):
    write_wav(tmp_path / "a.wav", np.zeros(12, np.int16), **form)
    with pytest.raises(DataError, match=rf"a.wav: {message}"):
        read_wav(tmp_path / "a.wav", 8000)


def test_an_empty_recording_and_a_missing_one(tmp_path):
    write_wav(tmp_path / "a.wav", EXTREMES[:0], rate=8000)
    with pytest.raises(DataError, match=r"a\.wav holds no samples"):
        read_wav(tmp_path / "a.wav", 8000)
    with pytest.raises(DataError, match=r"b\.wav cannot be read: .*No such file"):
        read_wav(tmp_path / "b.wav", 8000)


WHOLE = wav_bytes(EXTREMES, rate=8000)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_truncated_file(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("sound") / "a.wav"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(DataError, match=r"a\.wav (is no WAV file or is damaged|is cut short)"):
        read_wav(path, 8000)


@given(st.binary(max_size=100) | st.tuples(st.integers(0, 43), st.integers(0, 255)))
@example((16, 17))
@example((40, 255))
@example((43, 127))
def test_any_bytes_are_a_recording_or_an_error_that_names_the_file(tmp_path_factory, damage):
    if isinstance(damage, tuple):  # a byte of the header
        at, byte = damage
        damage = WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :]
    path = tmp_path_factory.mktemp("sound") / "a.wav"
    path.write_bytes(damage)
    fault = None
    try:
        samples = read_wav(path, 8000)
    except DataError as error:
        fault = str(error)
    assert 0 < len(samples) <= len(EXTREMES) if fault is None else str(path) in fault


@given(arrays.arrays(np.int16, st.integers(1, 50)))
def test_mean_and_std(samples):
    mean, std = mean_and_std(samples)
    levels = samples.astype(np.float64) / (LEVELS - 1)
    assert mean == pytest.approx(levels.mean(), abs=1e-12)
    assert std == pytest.approx(levels.std() if np.ptp(samples) else 1.0, rel=1e-9)
