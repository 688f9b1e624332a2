"""Internalized self-correction for Llama 3: data, training, measurement."""

import os

# transformers says at import that PyTorch is missing; nothing here needs it, and a program's errors are one clear line.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
