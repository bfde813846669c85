"""Small sound files for tests."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np


def wav_bytes(samples: np.ndarray, *, rate: int, channels: int = 1, width: int = 2) -> bytes:
    """What a WAV file of these samples holds."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return content.getvalue()


def write_wav(path: Path, samples: np.ndarray, **form: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wav_bytes(samples, **form))
