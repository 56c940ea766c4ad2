# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sound for probes, with the standard library: a tone to send, and a look at what came back."""

from __future__ import annotations

import io
import math
import struct
import wave
from typing import Optional, Tuple

RATE = 16000


def tone(seconds: float = 1.0, hertz: float = 440.0) -> bytes:
    """A WAV file (16 kHz, mono, 16 bit) with a quiet tone."""
    count = int(seconds * RATE)
    samples = (int(6000 * math.sin(2 * math.pi * hertz * i / RATE)) for i in range(count))
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{count}h", *samples))
    return target.getvalue()


def listen(data: bytes) -> Tuple[str, Optional[float]]:
    """Format and length in seconds (known only for WAV) of a sound file. Raises ValueError when it cannot be played."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav", _wav_seconds(data)
    if data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return "mp3", None
    for start, name in ((b"fLaC", "flac"), (b"OggS", "ogg")):
        if data.startswith(start):
            return name, None
    raise ValueError(f"{len(data)} bytes that are no sound file and start with {data[:16]!r}")


def _wav_seconds(data: bytes) -> Optional[float]:
    try:
        with wave.open(io.BytesIO(data)) as file:
            frames, rate = file.getnframes(), file.getframerate()
    except wave.Error as error:
        if "unknown format" in str(error):  # e.g. 32 bit float, which players know and this library does not
            return None
        raise ValueError(f"a damaged WAV file: {error}") from error
    except EOFError as error:
        raise ValueError("a WAV file that breaks off") from error
    if frames <= 0:
        raise ValueError("a WAV file without sound in it")
    # A streamed file claims a length of its own; what is really there counts.
    return min(frames, len(data)) / float(rate)
