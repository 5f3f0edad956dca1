"""The old path of `deitfast.use.predict`."""

from deitfast.use.predict import Classifier, annotate, get_model, inference_model

__all__ = ["Classifier", "annotate", "get_model", "inference_model"]
