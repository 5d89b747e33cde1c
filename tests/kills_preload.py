"""What every process of kills.py needs: imported once."""

import tiny  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import prep.preprocess.covariance
import prep.preprocess.decompose  # noqa: F401
